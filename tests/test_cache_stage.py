"""Caching as a stage, and distilling from what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_cache import make_cache, weights
from tiny_distillation import CONFIG, OPTIONS, data, held_out, rows_of, write_place

from regrow.checkpoint import Checkpoint
from regrow.stages.distill.stage import distill


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def live(place: Path) -> Path:
    """The pruned child, distilled from the live teacher."""
    out = place / "live"
    return distill(place / "pruned", place / "teacher", data(place), out, CONFIG, OPTIONS)


def no_body(self: Checkpoint, *_: object) -> None:
    if self.folder.name == "teacher":
        pytest.fail("loads the teacher")


def from_cache(place: Path, cached: Path, out: Path, patch: pytest.MonkeyPatch) -> Path:
    """Distil without the teacher's body."""
    load_model = Checkpoint.model
    patch.setattr(
        Checkpoint, "model", lambda self, *arguments: no_body(self) or load_model(self, *arguments)
    )
    config = CONFIG.model_copy(update={"cache": str(cached)})
    return distill(place / "pruned", place / "teacher", data(place), out, config, OPTIONS)


def test_hidden_states_teach_like_the_live_teacher(
    place: Path, live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: every logged number and every weight."""
    cached = make_cache(place, tmp_path / "cache", format="hidden")
    out = from_cache(place, cached, tmp_path / "out", monkeypatch)
    timing = ("seconds",)
    for live_row, cached_row in zip(rows_of(live), rows_of(out), strict=True):
        keep = [name for name in live_row if name not in timing and name != "stage"]
        assert [live_row[name] for name in keep] == [cached_row[name] for name in keep]
    expected = weights(live)
    for name, value in weights(out).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    "fields", [{"format": "topk"}, {"format": "samples"}, {"format": "hidden", "dtype": "int8"}]
)
def test_other_formats_teach_nearly_as_well(
    place: Path, live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict
) -> None:
    cached = make_cache(place, tmp_path / "cache", **fields)
    losses = held_out(from_cache(place, cached, tmp_path / "out", monkeypatch))
    exact = held_out(live)
    assert losses[0] == exact[0]  # held-out blocks are stored exactly
    assert losses[12] == pytest.approx(exact[12], rel=0.1)
    assert losses[12] < 0.8 * losses[0]
