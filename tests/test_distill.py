"""Distillation from folder to folder: every kind of student, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from tiny_distillation import (
    CONFIG,
    OPTIONS,
    STEPS,
    data,
    figures,
    held_out,
    kl_of,
    rows_of,
    write_place,
)
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrow.checkpoint import load
from regrow.config import parse
from regrow.errors import UserError
from regrow.stages.distill import setup
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill, rescue
from regrow.stages.distill.student import open_student
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.texts import build_texts
from regrow.training.callbacks import ProgressCallback
from regrow.training.checkpoints import last_checkpoint
from regrow.training.trainer import DistillTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


STUDENTS = {"pruned": "pruned", "stranger": "stranger", "fresh": "config.json"}

RATES = {"pruned": 1e-3, "stranger": 1e-2, "fresh": 2e-2}

TOO_FAST = {"learning_rate": 1e-2, "min_learning_rate_ratio": 1.0, "warmup_ratio": 0.0}


@pytest.fixture(scope="module")
def distilled(place: Path) -> dict[str, Path]:
    """Per kind of student what a distillation wrote."""
    found = {}
    for kind, name in STUDENTS.items():
        config = CONFIG.model_copy(update={"learning_rate": RATES[kind]})
        out = place / "out" / kind
        found[kind] = distill(place / name, place / "teacher", data(place), out, config, OPTIONS)
    return found


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_kind_of_student_learns(distilled: dict[str, Path], place: Path, kind: str) -> None:
    found = held_out(distilled[kind])
    assert list(found) == [0, 4, 8, 12]
    assert found[12] < found[4] < found[0]
    assert found[12] < 0.8 * found[0]
    losses = {row["step"]: row["loss"] for row in rows_of(distilled[kind]) if "loss" in row}
    assert list(losses) == list(range(1, STEPS + 1))
    assert figures(distilled[kind])["held-out KL before"] == found[0]
    assert figures(distilled[kind])["held-out KL"] == found[12]
    assert figures(distilled[kind])["training tokens"] == STEPS * 128
    # What was written is what was measured, by another road: stock classes and full logits.
    assert kl_of(distilled[kind], place) == pytest.approx(found[12], rel=0.03)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("pruned", torch.bfloat16), ("stranger", torch.float32), ("fresh", torch.bfloat16)],
)
def test_stock_reload(
    distilled: dict[str, Path], place: Path, kind: str, dtype: torch.dtype
) -> None:
    """In the parent's dtype (a fresh model's parent is the teacher), nothing missing or left."""
    model, info = AutoModelForCausalLM.from_pretrained(
        str(distilled[kind]), dtype="auto", output_loading_info=True
    )
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.use_cache
    given = place / STUDENTS[kind] if kind == "fresh" else place / STUDENTS[kind] / "config.json"
    expected = json.loads(given.read_text())
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        assert getattr(model.config, key) == expected[key]
    tokenizer = AutoTokenizer.from_pretrained(str(distilled[kind]))
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert model.config.eos_token_id == 0
    assert model.generation_config.eos_token_id == 0


def test_plan_and_tensorboard_travel(distilled: dict[str, Path], place: Path) -> None:
    plan = (place / "pruned" / "plan.json").read_text()
    assert (distilled["pruned"] / "plan.json").read_text() == plan
    assert not (distilled["stranger"] / "plan.json").exists()
    for folder in distilled.values():
        assert [path for path in folder.glob("tensorboard/**/*tfevents*") if path.stat().st_size]


def test_refused_before_any_slow_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tokenizers, and a batch that is no number of whole blocks."""
    monkeypatch.setattr(setup, "text_for", lambda *_: pytest.fail("reads text"))
    shutil.copytree(place / "stranger", tmp_path / "other")
    tiny_tokenizer(vocab_size=300).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UserError, match="different tokenizers"):  # the teacher lacks tokens
        distill(place / "pruned", tmp_path / "other", data(place), tmp_path / "out", CONFIG)
    config = CONFIG.model_copy(update={"batch_tokens": 100})
    with pytest.raises(UserError, match="batch_tokens 100 is no multiple of 32"):
        distill(place / "stranger", place / "teacher", data(place), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_losses_by_name(place: Path, tmp_path: Path) -> None:
    """A student that no forward KL teaches learns, and is chosen by it all the same."""
    losses = {"reverse_kl": 0.5, "jsd": 1.0, "cross_entropy": 0.05}
    update = {"losses": losses, "beta": 0.3, "temperature": 2.0, "exact_head": True}
    config = CONFIG.model_copy(update=update)
    out = distill(
        place / "pruned", place / "teacher", data(place), tmp_path / "out", config, OPTIONS
    )
    found = held_out(out)
    assert found[12] < 0.9 * found[0]
    measured = [row for row in rows_of(out) if "heldout_kl" in row]
    names = {"heldout_kl", "heldout_reverse_kl", "heldout_jsd", "heldout_cross_entropy"}
    assert all(names <= set(row) for row in measured)
    assert measured[-1]["heldout_reverse_kl"] < measured[0]["heldout_reverse_kl"]
    assert kl_of(out, place) == pytest.approx(found[12], rel=0.03)


BAD_LOSSES: dict[str, tuple[dict[str, float], str]] = {
    "unknown": ({"revers_kl": 1.0}, "no loss named 'revers_kl' — did you mean 'reverse_kl'?"),
    "zero": ({"jsd": 1.0, "forward_kl": 0.0}, "the weight of forward_kl must be above 0"),
    "negative": ({"jsd": -1.0}, "the weight of jsd must be above 0"),
    "no number": ({"jsd": float("nan")}, "jsd: Input should be a finite number (given: nan)"),
    "none": ({}, "name one at least, with its weight; there are: cross_entropy, forward_kl"),
}


@pytest.mark.parametrize(("losses", "said"), BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_bad_losses_are_refused_in_one_line(losses: dict[str, float], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(DistillConfig, {"losses": losses}, "distill")
    assert str(caught.value).startswith("distill.losses") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_checkpoint_is_chosen_on_text_that_evaluate_does_not_read(place: Path) -> None:
    """No run of 16 tokens is in both, however much held-out text evaluate is asked to read."""
    teacher = load(place / "teacher")
    student = open_student(place / "pruned", teacher)
    text = data(place)
    teachers = setup.TeacherSetup.open(CONFIG, student, teacher, OPTIONS, text)
    train, chosen_on = setup.DistillSetup.of(student, teachers, text, CONFIG, OPTIONS).sequences()
    config = EvaluateConfig(heldout_sequences=10_000)
    (evaluated,) = build_texts(text, tiny_tokenizer(), config)
    runs = [
        {
            tuple(run)
            for row in ids.input_ids.tolist()
            for run in zip(*(row[n:] for n in range(16)), strict=False)
        }
        for ids in (train, chosen_on, evaluated.sequences)
    ]
    assert all(runs)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not runs[one] & runs[other]


def test_the_best_checkpoint_is_kept_not_the_last(place: Path, tmp_path: Path) -> None:
    """At a rate at which a nearly perfect student only gets worse."""
    config = CONFIG.model_copy(update=TOO_FAST)
    out = distill(
        place / "pruned", place / "teacher", data(place), tmp_path / "out", config, OPTIONS
    )
    found = held_out(out)
    best = min(value for step, value in found.items() if step > 0)
    assert best < 0.9 * found[12], found
    assert figures(out)["held-out KL"] == best
    assert kl_of(out, place) == pytest.approx(best, rel=0.03)


def test_a_raised_budget_goes_on(distilled: dict[str, Path], place: Path, tmp_path: Path) -> None:
    """From the last step, also after the folder moved; a best checkpoint before it is known."""
    longer = CONFIG.model_copy(update=TOO_FAST)
    short = longer.model_copy(update={"tokens": 8 * 128})
    first = distill(
        place / "pruned", place / "teacher", data(place), tmp_path / "a" / "out", short, OPTIONS
    )
    before = rows_of(first)
    (tmp_path / "a").rename(tmp_path / "b")
    out = tmp_path / "b" / "out"
    assert distill(place / "pruned", place / "teacher", data(place), out, short, OPTIONS) == out
    assert rows_of(out) == before  # complete and unchanged
    distill(place / "pruned", place / "teacher", data(place), out, longer, OPTIONS)
    rows = rows_of(out)
    assert rows[: len(before)] == before
    assert list(held_out(out)) == [0, 4, 8, 12]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    best = min(held_out(out), key=lambda step: held_out(out)[step] if step else 9.0)
    assert best in (4, 8)  # of the first, shorter run
    state = json.loads((out / "trainer" / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_metric"] == min(value for step, value in held_out(out).items() if step)
    assert figures(out)["held-out KL"] == state["best_metric"]
    assert kl_of(out, place) == pytest.approx(state["best_metric"], rel=0.03)


@pytest.mark.parametrize("chosen_by", ["forward_kl", "last"])
def test_which_checkpoint_is_kept_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], chosen_by: str
) -> None:
    """The teacher itself learns hard labels: each checkpoint is further from it."""
    fields = {**TOO_FAST, "losses": {"cross_entropy": 1.0}, "chosen_by": chosen_by}
    config = CONFIG.model_copy(update={**fields, "learning_rate": 3e-3})
    teacher, out = place / "teacher", tmp_path / "out"
    distill(teacher, teacher, data(place), out, config, OPTIONS)
    found, said = held_out(out), capsys.readouterr().err
    assert found[0] < 1e-3 < found[4]
    assert found[4] < found[12]
    kept = 12 if chosen_by == "last" else min(list(found)[1:], key=lambda step: found[step])
    assert figures(out)["held-out KL"] == found[kept]
    assert figures(out)["training tokens of the kept student"] == kept * 128
    assert kl_of(out, place) == pytest.approx(found[kept], rel=0.05)
    assert f"held-out KL 0.000 before, {found[kept]:.3f} in the student that is kept" in said
    assert ("--chosen-by last keeps these" in said) == (chosen_by != "last")
    assert ("was lower before the training" in said) == (chosen_by != "last")


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    original = DistillTrainer.training_step

    def stops(self: DistillTrainer, *given: Any, **named: Any) -> Tensor:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *given, **named)

    patch.setattr(DistillTrainer, "training_step", stops)


def test_a_run_continues_exactly_from_a_checkpoint_between_two_measurements(
    distilled: dict[str, Path], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured every 4 steps, saved in every step, stopped in step 8: it continues from step 7."""
    often = OPTIONS.model_copy(update={"save_minutes": 1e-9})
    job = (place / "pruned", place / "teacher", data(place), tmp_path / "out", CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            distill(*job, often)
    kept = {path.name for path in tmp_path.glob(".out.partial/trainer/*")}
    assert kept == {"checkpoint-4", "checkpoint-7"}  # the best one and the last one
    capsys.readouterr()
    out = distill(*job, OPTIONS)
    assert "continues from checkpoint-7" in capsys.readouterr().err
    assert held_out(out) == held_out(distilled["pruned"])
    name = "model.safetensors"
    assert (out / name).read_bytes() == (distilled["pruned"] / name).read_bytes()
    kept = {path.name for path in (out / "trainer").iterdir()}
    assert kept == {path.name for path in (distilled["pruned"] / "trainer").iterdir()}


def test_a_checkpoint_is_never_written_with_weights_that_are_nan(
    place: Path, tmp_path: Path
) -> None:
    """No evaluation sees the weights before a checkpoint that the clock asked for."""
    often = OPTIONS.model_copy(update={"save_minutes": 1e-9})
    original = ProgressCallback.on_step_end

    def spoil(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        original(self, args, state, control)
        if state.global_step == 3:
            with torch.no_grad():
                next(given["model"].parameters())[0, 0] = float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_end", spoil)
        with pytest.raises(UserError, match=r"NaN or infinite at step 3; .*\(checkpoint-2\)"):
            distill(
                *(place / "pruned", place / "teacher", data(place), tmp_path / "out"), CONFIG, often
            )


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 49),  # 25,000 tokens
        ({"tokens": 100_000, "batch_tokens": 1024}, 24),
        ({"tokens": 4096}, 8),  # once, at the end
        ({"tokens": 100_000, "batch_tokens": 16_384}, 6),
        ({"batch_tokens": 16_384}, 10),
        ({"tokens": 10**9, "batch_tokens": 2**20}, 24),  # a fortieth
        ({"tokens": 10**9, "batch_tokens": 2**20, "eval_tokens": 1}, 1),
        ({"tokens": 10**9, "batch_tokens": 2**20, "eval_tokens": 2**21}, 2),
    ],
)
def test_steps_between_two_measurements(fields: dict[str, int], steps: int) -> None:
    assert setup.steps_between_measurements(DistillConfig(**fields)) == steps


def test_a_larger_budget_is_measured_less_often(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "MEASURED_TOKENS", 1)
    monkeypatch.setattr(setup, "MEASURED_STEPS", 1)
    monkeypatch.setattr(setup, "MEASUREMENTS", 3)
    job = (place / "pruned", place / "teacher", data(place), tmp_path / "out")
    for steps in (3, 12):
        config = CONFIG.model_copy(update={"tokens": steps * 128, "eval_tokens": None})
        out = distill(*job, config, OPTIONS)
    assert list(held_out(out)) == [0, 1, 2, 3, 4, 8, 12]


def test_the_last_whole_checkpoint_is_gone_on_from(place: Path, tmp_path: Path) -> None:
    """By number, not by name; what a kill left of a later one is removed."""
    states = {8: "{}", 16: '{"step": 16}', 24: '{"ste', 32: None}
    for step, state in states.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-16"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-16"}
    said = rescue(tmp_path, tmp_path / "out", load(place / "teacher"))
    assert said.endswith(f"is kept in {tmp_path}/out-stopped")
    assert (tmp_path / "out-stopped" / "trainer_state.json").read_text() == states[16]
    assert last_checkpoint(tmp_path / "none") is None
