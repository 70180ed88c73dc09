"""The search for a shape: scores, the table, and when it is done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import data_of
from tiny_pruning import OPTIONS, chosen, slow_kl, write_place

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.pruning.config import PruneConfig
from regrow.pruning.cut import cut_model
from regrow.search import score
from regrow.stages.prune import choose_shape as choose_shape_module
from regrow.stages.prune import stage as prune_stage
from regrow.stages.prune.stage import prune


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


KEEP = PruneConfig(keep_params=0.8, multiple_of=2)


def search_in(place: Path, out: Path, config: PruneConfig = KEEP) -> list[dict[str, Any]]:
    data = data_of(place / "text.jsonl")
    prune(place / "model", out, config, place / "profile", data, OPTIONS)
    table: list[dict[str, Any]] = json.loads((out / "candidates.json").read_text())
    return table


def kl_at(place: Path, sizes: dict[str, int], sequences: int = 8) -> float:
    """KL(dense ‖ cut to `sizes`) without repair, the slow way."""
    dense = Checkpoint(place / "model").model(torch.float32)
    return slow_kl(place, cut_model(dense, chosen(place, **sizes)), sequences)


def test_the_search_takes_the_shape_of_lowest_kl(place: Path, tmp_path: Path) -> None:
    config = KEEP.model_copy(update={"repair": False})
    table = search_in(place, tmp_path / "out", config)
    assert len(table) >= 3
    (row,) = (row for row in table if row["chosen"])
    assert row["kl"] == min(row["kl"] for row in table) > 0
    for other in table:
        assert abs(other["keep"] - 0.8) <= 0.01
        assert other["kl"] == pytest.approx(kl_at(place, other["sizes"]), rel=0.02)
    cut = Checkpoint(tmp_path / "out")
    sizes = families.of(cut).sizes(cut.config)
    assert {dim: sizes[dim] for dim in row["sizes"]} == row["sizes"]
    assert families.of(cut).count(cut.config) == row["parameters"]


def test_the_best_few_are_scored_repaired(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others keep the KL of their cut; a repair counts where it lowers the KL."""
    monkeypatch.setattr(score, "FINALISTS", 2)
    plain = search_in(place, tmp_path / "plain", KEEP.model_copy(update={"repair": False}))
    table = search_in(place, tmp_path / "repaired")
    before = {row["name"]: row["kl"] for row in plain}
    finalists = [row for row in table if row["round"] == 2]
    assert {row["name"] for row in finalists} == {row["name"] for row in plain[:2]}
    assert table[:2] == finalists == sorted(finalists, key=lambda row: row["kl"])
    assert all(row["kl"] <= before[row["name"]] for row in finalists)
    assert any(row["kl"] < before[row["name"]] for row in finalists)
    assert len(table) > 2
    for row in table[2:]:
        assert row["kl"] == before[row["name"]]


def test_a_repair_that_does_harm_does_not_count(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three shapes (1, 2, 3), repair spoils the first and gives no number for the second."""
    repaired = iter([9.0, float("nan"), 2.5])
    plain = iter([2.0, 1.0, 3.0])

    def kl(self: Any, plan: Any, config: PruneConfig | None, *_: Any) -> float:
        return next(plain if config is None else repaired)

    monkeypatch.setattr(score.CutScorer, "kl", kl)
    table = search_in(place, tmp_path / "out")
    assert [row["kl"] for row in table] == [1.0, 2.0, 2.5]
    assert table[0]["chosen"]


def test_a_search_is_repeated_when_its_config_changes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    runs: list[int] = []
    choose_shape = choose_shape_module.choose_shape

    def counted(*arguments: Any) -> list[dict[str, Any]]:
        runs.append(1)
        return choose_shape(*arguments)

    monkeypatch.setattr(prune_stage, "choose_shape", counted)
    search_in(place, out)
    before = (out / "model.safetensors").stat().st_mtime_ns
    search_in(place, out)
    assert len(runs) == 1
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    table = search_in(place, out, KEEP.model_copy(update={"keep_params": 0.7}))
    assert len(runs) == 2
    assert all(abs(row["keep"] - 0.7) <= 0.01 for row in table)
    cut = Checkpoint(out)
    assert families.of(cut).count(cut.config) in {row["parameters"] for row in table}


def test_many_shapes_go_through_rounds(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The winner is the best of those scored on all of the text, and that is its score."""
    fields = {"keep_params": 0.6, "multiple_of": 1, "num_candidates": 24, "repair": False}
    config = KEEP.model_copy(update=fields)
    table = search_in(place, tmp_path / "out", config)
    assert len(table) == 24
    assert len({tuple(sorted(row["sizes"].items())) for row in table}) == len(table)
    assert all(abs(row["keep"] - 0.6) <= 0.01 for row in table)
    by_round = {n: [row for row in table if row["round"] == n] for n in (1, 2, 3)}
    assert [len(by_round[n]) for n in (3, 2, 1)] == [8, 0, 16]
    assert [row["chosen"] for row in table] == [True, *[False] * (len(table) - 1)]
    last = [row["kl"] for row in by_round[3]]
    assert last == sorted(last)
    assert table[0]["kl"] == pytest.approx(kl_at(place, table[0]["sizes"], sequences=64), rel=0.02)
    output = capsys.readouterr().err
    assert "rank correlation of rounds 2 and 3" in output
    assert "dense evaluations of 2,048 tokens" in output


def test_rounds_and_finalists_equal_hand_computed_values() -> None:
    assert score.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert score.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # 1 − 6 Σd² / (n (n² − 1)) with d = 0, 1, 1, 0
    assert score.rank_correlation([1, 2, 3, 4], [1, 3, 2, 9]) == pytest.approx(0.8)
    assert score.rounds_for(8) == [(1.0, 8)]
    assert score.rounds_for(200) == [(1 / 32, 40), (1 / 8, 8), (1.0, 8)]
    assert score.rounds_for(8, 3) == [(1.0, 3), (1.0, 3)]
    assert score.rounds_for(2, 3) == [(1.0, 2), (1.0, 2)]
    assert score.rounds_for(200, 3) == [(1 / 32, 40), (1 / 8, 8), (1.0, 3), (1.0, 3)]
    assert score.passes_for(200) == 1 + 200 / 32 + 40 / 8 + 8
    assert score.passes_for(200, 3) == 1 + 200 / 32 + 40 / 8 + 8 + 3
    distilled = KEEP.model_copy(update={"halving_tokens": 1024, "halving_shapes": 5})
    plain = KEEP.model_copy(update={"repair": False})
    assert [score.finalists_for(search_config) for search_config in (KEEP, distilled, plain)] == [
        3,
        5,
        0,
    ]
    assert score.passes_for(1) == 0


def test_a_score_that_is_nan_is_not_chosen(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([float("nan"), 3.0, 1.0, *[2.0] * 9])
    monkeypatch.setattr(score.CutScorer, "kl", lambda *_: next(scores))
    table = search_in(place, tmp_path / "out")
    assert [row["kl"] for row in table if row["chosen"]] == [1.0]


def test_a_search_without_its_inputs_is_refused(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="keep_params needs data"):
        prune(place / "model", out, KEEP, place / "profile", None, OPTIONS)
    with pytest.raises(UserError, match="keep_params needs a profile"):
        prune(place / "model", out, KEEP, None, None, OPTIONS)
    two_targets = KEEP.model_copy(update={"num_layers": 3})
    with pytest.raises(UserError, match="one of them"):
        prune(place / "model", out, two_targets, place / "profile", None, OPTIONS)
    assert not out.exists()


def test_the_reported_cost_equals_the_tokens_read(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Blocks read by each cut model, by its share of the parameters, over those of the text."""
    family, parent = families.get("llama"), Checkpoint(place / "model").config
    read = [64.0]  # the dense model's own
    mean_loss = score.mean_loss

    def counted(student: Any, batches: Any, *rest: Any) -> float:
        sequences = sum(len(batch["input_ids"]) for batch in batches)
        share = sum(p.numel() for p in student.parameters()) / family.count(parent)
        read.append(sequences * share)
        return mean_loss(student, batches, *rest)

    monkeypatch.setattr(score, "mean_loss", counted)
    fields = {"keep_params": 0.6, "multiple_of": 1, "num_candidates": 60, "repair": False}
    table = search_in(place, tmp_path / "out", KEEP.model_copy(update=fields))
    cost = sum(read) / 64
    assert f"cost {cost:.1f} dense evaluations" in capsys.readouterr().err
    assert cost <= score.passes_for(len(table)) <= 20


def test_two_hundred_shapes_cost_at_most_twenty_dense_evaluations() -> None:
    """Of shapes that keep 95 % of the parameters; the dense model's own is counted."""
    for count in range(2, 201):
        dense_cost = 1.0
        assert dense_cost + 0.95 * (score.passes_for(count) - dense_cost) <= 20
