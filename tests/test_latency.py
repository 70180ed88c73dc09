"""Limits in milliseconds: the fitted cost, and shapes that are fast enough when timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_choose import SMOLLM2
from tiny_folders import data_of
from tiny_models import tiny_model
from tiny_pruning import OPTIONS, write_place

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.pruning.config import PruneConfig
from regrow.search import latency
from regrow.search.latency import Latency, LatencyModel, shapes_to_time
from regrow.stages.prune.stage import prune

LLAMA = families.get("llama")


def planted(sizes: dict[str, int]) -> Latency:
    full = {**LLAMA.sizes(SMOLLM2), **sizes}
    head = full["vocab"] * full["hidden"]
    per_layer = 0.2 + 1e-6 * 3 * full["hidden"] * full["mlp"]
    return Latency(
        5 + full["layers"] * per_layer, 1 + full["layers"] * per_layer / 50 + 1e-7 * head
    )


def test_the_fit_recovers_planted_costs() -> None:
    """Shapes that were not timed are predicted; no cost is negative."""
    timed = shapes_to_time(LLAMA, SMOLLM2, 32)
    assert len(timed) >= 9 and timed[0] == {}
    fitted = LatencyModel(LLAMA, SMOLLM2, [(sizes, planted(sizes)) for sizes in timed])
    for sizes in ({"layers": 17, "mlp": 640}, {"mlp": 1184}, {"layers": 29}):
        assert fitted.predict(sizes).prefill_ms == pytest.approx(
            planted(sizes).prefill_ms, rel=1e-6
        )
        assert fitted.predict(sizes).decode_ms == pytest.approx(planted(sizes).decode_ms, rel=1e-6)
    falling = [(sizes, Latency(1 / planted(sizes).prefill_ms, 1.0)) for sizes in timed]
    odd = LatencyModel(LLAMA, SMOLLM2, falling)
    assert odd.predict({"layers": 1}).prefill_ms <= odd.predict({}).prefill_ms


def test_a_larger_model_takes_longer() -> None:
    small, large = (tiny_model("llama", num_hidden_layers=n) for n in (1, 24))
    small_times, large_times = (latency.timed(model, 16) for model in (small, large))
    assert 0 < small_times.prefill_ms < large_times.prefill_ms
    assert 0 < small_times.decode_ms < large_times.decode_ms


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def by_parameters(factor: float = 1.0) -> Any:
    """A clock that knows the parameters; it says `factor` more of those it did not fit on."""
    counts: list[int] = []

    def timed(model: Any, tokens: int) -> Latency:
        counts.append(1)
        slower = factor if len(counts) > 12 else 1.0
        count = sum(p.numel() for p in model.parameters())
        return Latency(slower * count / 1e3, count / 1e5)

    return timed


@pytest.mark.parametrize("factor", [1.0, 1.15])
def test_the_result_is_fast_enough_when_timed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Also where the prediction was 15 % too good: such shapes are made smaller."""
    monkeypatch.setattr(latency, "timed", by_parameters(factor))
    data = data_of(place / "text.jsonl")
    config = PruneConfig(max_prefill_ms=100.0, multiple_of=2)
    prune(place / "model", tmp_path / "out", config, place / "profile", data, OPTIONS)
    table = json.loads((tmp_path / "out" / "candidates.json").read_text())
    assert len(table) >= 3
    for row in table:
        assert row["prefill_ms"] == pytest.approx(factor * row["parameters"] / 1e3)
        assert 85 < row["prefill_ms"] <= 100
    cut = Checkpoint(tmp_path / "out")
    assert families.of(cut).count(cut.config) == table[0]["parameters"]


def test_a_limit_below_the_minimum_is_refused_with_the_minimum(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "timed", by_parameters())
    data = data_of(place / "text.jsonl")
    arguments = (place / "model", tmp_path / "out")
    for limits, message in (
        (0.001, "the smallest shape this model can be cut"),
        (9e9, "nothing to cut"),
    ):
        config = PruneConfig(max_decode_ms=limits, multiple_of=2)
        with pytest.raises(UserError, match=rf"max_decode_ms .*{message}"):
            prune(*arguments, config, place / "profile", data, OPTIONS)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(latency, "timed", by_parameters(100.0))
    config = PruneConfig(max_prefill_ms=100.0, multiple_of=2)
    with pytest.raises(UserError, match=r"none of \d shapes was fast enough when timed"):
        prune(*arguments, config, place / "profile", data, OPTIONS)
