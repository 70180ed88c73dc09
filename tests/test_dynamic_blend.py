"""Shares that follow the excess loss: the formula, the order of sequences, and an exact resume."""

from __future__ import annotations

import json
import math
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_distillation import CONFIG, OPTIONS, write_place
from tiny_folders import data_of, write_text
from tiny_job import refused
from tiny_training import start_ranks
from torch import Tensor

from regrow import DataConfig, DistillConfig, UserError, distill
from regrow.checkpoint import Checkpoint, load
from regrow.config import parse
from regrow.data.sequences import build_sequences
from regrow.stages.distill.domains import check_domains
from regrow.training.checkpoints import last_checkpoint
from regrow.training.dynamic_blend import BlendedSequences, DynamicBlend, teacher_losses, updated
from regrow.training.teacher import Teacher
from regrow.training.trainer import DistillTrainer

DYNAMIC = CONFIG.model_copy(update={"dynamic_blend": True})


def test_the_formula() -> None:
    shares, losses, goals = [0.5, 0.3, 0.2], [3.0, 2.5, 1.0], [2.0, 2.4, 1.5]
    raised = [0.5 * math.exp(1.0), 0.3 * math.exp(0.1), 0.2]
    expected = [each / sum(raised) for each in raised]
    assert updated(shares, losses, goals) == pytest.approx(expected, abs=1e-12)
    assert sum(updated(shares, losses, goals)) == pytest.approx(1)


def test_the_formula_of_losses_whose_exp_is_no_float() -> None:
    shares, losses, goals = [0.5, 0.3, 0.2], [3001.5, 3001.4, 2.0], [2.0, 2.4, 1.5]
    excess = [Decimal(loss) - Decimal(goal) for loss, goal in zip(losses, goals, strict=True)]
    raised = [Decimal(share) * each.exp() for share, each in zip(shares, excess, strict=True)]
    expected = [float(each / sum(raised)) for each in raised]
    assert expected[1] > 0.1
    assert updated(shares, losses, goals) == pytest.approx(expected, abs=1e-12)
    assert updated([1.0, 0.0], [2.0, 3001.0], [1.0, 1.0]) == [1.0, 0.0]  # 0 stays 0


def test_sequences_follow_the_shares_and_are_read_in_order() -> None:
    blend = DynamicBlend(["a", "b"], [3, 1], [1.0, 1.0])
    blend.place(119)  # a prefetch beyond the change is forgotten
    blend.update([1.0, 1.0 + math.log(9)], 100)  # shares 3 : 9
    places = [blend.place(number) for number in range(300)]
    counts = [sum(source == 1 for source, _ in places[:end]) for end in (40, 100, 300)]
    assert counts == [10, 25, 25 + 150]
    for source in (0, 1):
        positions = [position for each, position in places if each == source]
        assert positions == list(range(len(positions)))
    again = DynamicBlend(["a", "b"], [3, 1])
    again.load_state_dict(json.loads(json.dumps(blend.state_dict())))
    numbers = list(range(300))
    random.Random(0).shuffle(numbers)
    assert [again.place(n) for n in numbers] == [places[n] for n in numbers]
    assert again.references == [1.0, 1.0]
    again.update([1.0, 1.0], 300)
    assert [again.place(n) for n in range(300)] == places


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual place, with a second text of other words."""
    place = write_place(tmp_path_factory.mktemp("blend"))
    write_text(place / "other.jsonl", seed=1)
    rows = [json.loads(line) for line in (place / "other.jsonl").read_text().splitlines()]
    rows = [{"text": row["text"].upper()} for row in rows]
    (place / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def two(place: Path, **fields: Any) -> DataConfig:
    sources = [str(place / "text.jsonl"), {"source": str(place / "other.jsonl"), "weight": 3}]
    return data_of(place / "text.jsonl", sources=sources, **fields)


def slow_loss(model: Any, place: Path, name: str, count: int) -> float:
    """Cross-entropy of a source's validation sequences by full logits."""
    tokenizer = load(place / "teacher").tokenizer()
    sequences = build_sequences(data_of(place / name), tokenizer, "validation", count)
    batch = next(sequences.batches(count))
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
    labels = batch["labels"][:, 1:].flatten()
    kept = logits[:, :-1].flatten(0, 1).float()
    return float(torch.nn.functional.cross_entropy(kept, labels, ignore_index=-100))


def test_reference_losses_are_the_teachers(place: Path) -> None:
    teacher = load(place / "teacher")
    sets = [
        build_sequences(data_of(place / name), teacher.tokenizer(), "validation", 3)
        for name in ("text.jsonl", "other.jsonl")
    ]
    found = teacher_losses(Teacher(teacher.model(torch.float32)), sets, 2)
    model = teacher.model(torch.float32)
    expected = [slow_loss(model, place, name, 3) for name in ("text.jsonl", "other.jsonl")]
    assert found == pytest.approx(expected, rel=1e-3)
    assert abs(found[0] - found[1]) > 0.01


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_changes_its_shares_and_a_killed_run_continues_exactly(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    get = BlendedSequences.__getitem__

    def noted(self: BlendedSequences, number: int) -> dict[str, Tensor]:
        read.append(self.blend.place(number)[0])
        return get(self, number)

    monkeypatch.setattr(BlendedSequences, "__getitem__", noted)
    given = (place / "pruned", place / "teacher", two(place))
    config = DYNAMIC.model_copy(update={"reference_losses": (2.0, 6.0)})
    whole = distill(*given, place / "whole", config, OPTIONS)
    rows = [row for row in metrics(whole) if "heldout_kl" in row]
    shares = [1 / 4, 3 / 4]
    for row in rows:
        losses = [row[f"heldout_cross_entropy of {name}"] for name in ("text", "other")]
        shares = updated(shares, losses, (2.0, 6.0))
        found = [row[f"heldout_share of {name}"] for name in ("text", "other")]
        assert found == pytest.approx(shares, abs=1e-9)
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert shares[0] > 0.9  # the text's loss is far above 2, the other's not so far above 6
    first, later = read[:4], read[24:48]
    assert first.count(1) == 3  # the weights of the sources, until the second step
    assert later.count(0) > 0.8 * len(later)

    step = DistillTrainer.training_step

    def stops(self: DistillTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    drop = ("seconds", "stage")
    for minutes, last in ((30.0, 4), (1e-9, 6)):  # saved at measurements, and in every step
        options = OPTIONS.model_copy(update={"save_minutes": minutes})
        killed = place / f"killed-{last}"
        with monkeypatch.context() as patch:
            patch.setattr(DistillTrainer, "training_step", stops)
            with pytest.raises(KeyboardInterrupt):
                distill(*given, killed, config, options)
        partial = place / f".{killed.name}.partial" / "trainer"
        assert last_checkpoint(partial) == partial / f"checkpoint-{last}"
        distill(*given, killed, config, options)
        again = [row for row in metrics(killed) if "heldout_kl" in row]
        assert [{k: v for k, v in row.items() if k not in drop} for row in again] == [
            {k: v for k, v in row.items() if k not in drop} for row in rows
        ]
        assert Checkpoint(killed).fingerprint == Checkpoint(whole).fingerprint


def _distill(rank: int, place: str, out: str) -> None:
    where = Path(place)
    distill(where / "pruned", where / "teacher", two(where), Path(out), DYNAMIC, OPTIONS)


def test_two_processes_change_the_shares_as_one_does(place: Path, tmp_path: Path) -> None:
    _distill(0, str(place), str(tmp_path / "one"))
    start_ranks(2, _distill, str(place), str(tmp_path / "several"))
    one, several = (
        [row for row in metrics(tmp_path / name) if "heldout_kl" in row]
        for name in ("one", "several")
    )
    assert [row["step"] for row in several] == [row["step"] for row in one]
    assert one[-1]["heldout_share of text"] != pytest.approx(one[0]["heldout_share of text"], 1e-2)
    for alone, together in zip(one, several, strict=True):
        for name, value in alone.items():
            if name.startswith("heldout_"):
                assert together[name] == pytest.approx(value, rel=1e-2), name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "number": ({"reference_losses": (1.0,)}, "1 reference_losses for 2 sources"),
    "cache": ({"cache": "somewhere"}, "dynamic_blend with cache: not supported"),
    "answers": ({"answers": "somewhere"}, "dynamic_blend with answers: not supported"),
    "on policy": ({"on_policy_share": 0.5}, "dynamic_blend with on_policy_share"),
    "teachers": ({"extra_teachers": {"x": 0.5}}, "give reference_losses"),
    "off": ({"dynamic_blend": False, "reference_losses": (1.0, 1.0)}, "set it to true"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, place: Path) -> None:
    fields, message = REFUSED[case]
    config = parse(DistillConfig, {"dynamic_blend": True, **fields}, "distill")
    with pytest.raises(UserError, match=message):
        check_domains(config, two(place), OPTIONS)


def test_one_source_is_refused_on_the_command_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["distill", place / "pruned", "--teacher", place / "teacher", "--dynamic-blend"]
    text = ["--data", place / "text.jsonl", "--sequence-length", 32, "--batch-tokens", 128]
    told = refused(capsys, *given, *text, "--out", tmp_path / "out")
    assert "give two sources or more" in told
    assert not (tmp_path / "out").exists()


def test_a_model_that_mixes_documents_gets_one_in_each_sequence(
    place: Path, tmp_path: Path, alone: list[bool]
) -> None:
    config = DYNAMIC.model_copy(update={"tokens": 128, "reference_losses": (2.0, 6.0)})
    distill(place / "pruned", place / "teacher", two(place), tmp_path / "out", config, OPTIONS)
    assert alone == [True] * 4
