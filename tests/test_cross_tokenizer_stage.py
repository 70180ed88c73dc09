"""A distillation across tokenizers, as a stage and in a recipe, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_distillation import OPTIONS, figures, rows_of
from tiny_folders import data_of, write_model, write_text
from tiny_tokenizer import tiny_tokenizer, tiny_tokenizer_of
from transformers import AutoModelForCausalLM

from regrow.checkpoint import Checkpoint
from regrow.cli.main import main
from regrow.config import Options
from regrow.data.sequences import build_sequences
from regrow.errors import UserError
from regrow.recipe.recipe import Recipe, run
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill
from regrow.stages.distill.teacher import aligner_of
from regrow.training.cross_tokenizer.align import Aligner
from regrow.training.cross_tokenizer.teacher import CrossTokenizerTeacher
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import bind_loss
from regrow.training.teacher import Teacher

CONFIG = DistillConfig(
    tokens=1024,
    batch_tokens=128,
    eval_tokens=512,
    heldout_sequences=4,
    learning_rate=3e-3,
    cross_tokenizer="spans",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spans")
    write_text(folder / "text.jsonl")
    for name, tokenizer in (
        ("student", tiny_tokenizer()),
        ("teacher", tiny_tokenizer_of("byte fallback")),
    ):
        size = len(tokenizer) + 16 * (name == "teacher")  # rows of padding are left out
        write_model(folder / name, num_hidden_layers=2, vocab_size=size)
        tokenizer.save_pretrained(str(folder / name))
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    data = data_of(place / "text.jsonl")
    return distill(place / "student", place / "teacher", data, place / "trained", CONFIG, OPTIONS)


def span_kl(folder: Path, place: Path) -> float:
    """The validation figure in float32, computed by the loss itself."""
    student, teacher = Checkpoint(folder), Checkpoint(place / "teacher")
    sequences = build_sequences(data_of(place / "text.jsonl"), student.tokenizer(), "validation", 4)
    batch = next(sequences.batches(4))
    size = len(teacher.tokenizer())
    aligner = Aligner(student.tokenizer(), teacher.tokenizer())
    spans = CrossTokenizerTeacher(Teacher(teacher.model(torch.float32), size=size), aligner, 100.0)
    model = student.model(torch.float32)
    bind_loss(model, spans, LossWeights({"forward_kl": 1.0}))
    with torch.no_grad():
        outputs = model(**{k: batch[k] for k in ("input_ids", "position_ids", "labels")})
    return float(outputs["loss"]) / int(outputs["tokens"])


def test_the_student_learns_and_the_best_is_kept(place: Path, trained: Path) -> None:
    measured = figures(trained)
    before, after = measured["held-out span KL before"], measured["held-out span KL"]
    assert after < 0.9 * before
    assert before == pytest.approx(span_kl(place / "student", place), rel=0.05)
    assert after == pytest.approx(span_kl(trained, place), rel=0.05)
    rows = rows_of(trained)
    assert after == min(row["heldout_span_kl"] for row in rows[1:] if "heldout_span_kl" in row)
    assert all(0.8 < row["in_spans"] <= 1 for row in rows if "in_spans" in row)
    assert not any("heldout_kl" in row for row in rows)
    assert Checkpoint(trained).tokenizer().get_vocab() == tiny_tokenizer().get_vocab()
    assert AutoModelForCausalLM.from_pretrained(str(trained)).config.vocab_size == 384


def test_a_larger_budget_resumes(place: Path, trained: Path, tmp_path: Path) -> None:
    data, config = data_of(place / "text.jsonl"), CONFIG.model_copy(update={"tokens": 1280})
    out = distill(place / "student", place / "teacher", data, place / "trained", config, OPTIONS)
    assert max(row["step"] for row in rows_of(out)) == 10


def test_cross_entropy_alone_trains_and_the_span_kl_chooses_the_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequence level: a training step runs no teacher, held-out text is measured against it."""
    modes: list[bool] = []
    compare = CrossTokenizerTeacher._compare

    def watched(self: CrossTokenizerTeacher, *arguments: Any) -> Any:
        modes.append(torch.is_grad_enabled())
        return compare(self, *arguments)

    monkeypatch.setattr(CrossTokenizerTeacher, "_compare", watched)
    update = {"losses": {"cross_entropy": 1.0}, "tokens": 256, "heldout_sequences": 2}
    config = CONFIG.model_copy(update=update)
    data = data_of(place / "text.jsonl")
    out = distill(place / "student", place / "teacher", data, tmp_path / "out", config, OPTIONS)
    assert modes
    assert not any(modes)
    assert "held-out span KL" in figures(out)


def test_a_recipe_adds_cross_entropy(place: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"tokens": 256, "batch_tokens": 128, "heldout_sequences": 2}
    fields |= {"teacher": str(place / "teacher"), "cross_tokenizer": "spans"}
    fields["losses"] = {"jsd": 1.0, "cross_entropy": 0.1}
    data = data_of(place / "text.jsonl")
    recipe = Recipe(model=str(place / "student"), data=data, stages=[{"distill": fields}])
    out = run(recipe, tmp_path / "run", OPTIONS)
    rows = rows_of(out / "stages" / "01-distill")
    assert {"span_jsd", "cross_entropy", "in_spans"} <= set(rows[1])
    assert {"heldout_span_kl", "heldout_span_jsd", "heldout_cross_entropy"} <= set(rows[0])


def test_without_cross_tokenizer_losses_other_tokenizers_are_refused(
    place: Path, tmp_path: Path
) -> None:
    data = data_of(place / "text.jsonl")
    with pytest.raises(UserError, match=r"different tokenizers .* give --cross-tokenizer spans"):
        distill(place / "student", place / "teacher", data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_equal_tokens_are_compared_token_by_token(place: Path) -> None:
    student = Checkpoint(place / "student")
    assert aligner_of(CONFIG, student, student, OPTIONS) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache": "x"}, "cache has distributions over the teacher"),
        ({"feature_losses": {"hidden": 1.0}}, "feature_losses compare states at the same tokens"),
        ({"extra_teachers": {"x": 0.5}}, "extra_teachers mix distributions over the same tokens"),
        ({"temperature": 2.0}, "set it to 1, and span_temperature instead"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    place: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    config = CONFIG.model_copy(update=fields)
    with pytest.raises(UserError, match=message) as caught:
        distill(
            place / "student",
            place / "teacher",
            data_of(place / "text.jsonl"),
            tmp_path / "out",
            config,
            OPTIONS,
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_sharding_is_refused(place: Path) -> None:
    options = Options(device="cpu", sharding="fsdp")
    with pytest.raises(UserError, match="spans with sharding fsdp"):
        aligner_of(CONFIG, Checkpoint(place / "student"), Checkpoint(place / "teacher"), options)


def test_a_dry_run_asks_for_cross_tokenizer_spans(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["distill", str(place / "student"), "--teacher", str(place / "teacher")]
    arguments += ["--data", str(place / "text.jsonl"), "--sequence-length", "32"]
    arguments += ["--out", str(tmp_path / "out"), "--dry-run"]
    assert main(arguments) == 2
    assert "--cross-tokenizer spans" in capsys.readouterr().err
    assert main([*arguments, "--cross-tokenizer", "spans"]) == 0
    assert "distill: " in capsys.readouterr().out
