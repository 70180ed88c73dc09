"""A distillation by two processes gives what one gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_distillation import (
    CONFIG,
    OPTIONS,
    STEPS,
    data,
    held_out,
    rows_of,
    write_place,
)
from tiny_training import start_ranks
from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.stages.distill import distill


def _distill(rank: int, place: str, out: str) -> None:
    where = Path(place)
    distill(where / "pruned", where / "teacher", data(where), Path(out), CONFIG, OPTIONS)


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name).float() for name in checkpoint.names()}


def test_two_ranks_write_the_student_of_one(tmp_path: Path) -> None:
    place = write_place(tmp_path / "place")
    one, out = tmp_path / "one", tmp_path / "several" / "out"
    distill(place / "pruned", place / "teacher", data(place), one, CONFIG, OPTIONS)
    start_ranks(2, _distill, str(place), str(out))
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    alone, together = held_out(one), held_out(out)
    assert list(together) == list(alone)
    assert [row["step"] for row in rows_of(out) if "loss" in row] == list(range(1, STEPS + 1))
    for step, value in alone.items():
        assert together[step] == pytest.approx(value, rel=1e-3)
    expected = weights(one)
    for name, value in weights(out).items():
        assert float((value - expected[name]).norm() / expected[name].norm()) < 1e-2, name
