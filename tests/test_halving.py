"""Successive halving: which shapes continue, what is recorded, how a killed search resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_folders import data_of
from tiny_pruning import OPTIONS, write_place

from regrow.pruning.config import PruneConfig
from regrow.search import score
from regrow.stage_dir import read
from regrow.stages.distill import stage as distill_stage
from regrow.stages.prune import choose_shape as halving
from regrow.stages.prune.stage import prune

CONFIG = PruneConfig(
    keep_params=0.6, multiple_of=1, num_candidates=12, halving_tokens=1024, halving_shapes=4
)


def rows_of(names: str) -> list[dict[str, Any]]:
    return [{"name": name, "sizes": {"mlp": n}} for n, name in enumerate(names)]


def test_the_better_half_is_distilled_twice_as_long() -> None:
    """b starts behind and learns fastest; c gives no number."""
    learns = {"a": (2.0, 0.1), "b": (2.15, 2.0), "c": (math.nan, 0.0), "d": (2.5, 0.0)}
    distilled: list[tuple[str, int]] = []
    lost: list[str] = []

    def score(row: dict[str, Any], tokens: int) -> float:
        distilled.append((row["name"], tokens))
        start, pace = learns[row["name"]]
        return start - pace * tokens / 1000

    out = halving.halve(rows_of("abcd"), 100, score, lambda row: lost.append(row["name"]))
    assert [row["name"] for row in out] == ["b", "a", "d", "c"]
    assert distilled == [*(("abcd"[n], 100) for n in range(4)), ("b", 200), ("a", 200)]
    assert lost == ["d", "c", "a"]
    assert out[0]["distilled"] == {"100": pytest.approx(1.95), "200": pytest.approx(1.75)}


def test_rungs_and_their_cost_equal_hand_computed_values() -> None:
    assert halving.rungs_for(4, 100) == [(4, 100), (2, 200)]
    assert halving.rungs_for(7, 100) == [(7, 100), (3, 200)]
    assert halving.tokens_for(8, 100) == 8 * 100 + 4 * 100 + 2 * 200
    assert halving.tokens_for(1, 100) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def search_in(place: Path, out: Path) -> list[dict[str, Any]]:
    data = data_of(place / "text.jsonl")
    prune(place / "model", out, CONFIG, place / "profile", data, OPTIONS)
    table: list[dict[str, Any]] = json.loads((out / "candidates.json").read_text())
    return table


def test_a_killed_search_resumes_in_its_rung(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No round, no finished distillation is done twice, and the result is the same as in one go."""
    distill, done = distill_stage.distill, list[tuple[str, int]]()
    seen, killed = list[int](), list[int]()
    score_row = score.Rounds.score

    def once_killed(student: Any, *rest: Any) -> Path:
        if len(done) == 5 and not killed:
            killed.append(1)
            raise KeyboardInterrupt
        trained = distill(student, *rest)
        done.append((Path(student).name, rest[3].tokens))
        return trained

    def counted(self: Any, *given: Any) -> Any:
        seen.append(1)
        return score_row(self, *given)

    monkeypatch.setattr(distill_stage, "distill", once_killed)
    monkeypatch.setattr(score.Rounds, "score", counted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        search_in(place, out)
    assert not out.exists()
    table = search_in(place, out)
    assert (len(seen), len(killed)) == (4, 1)  # the untrained rounds once
    assert [tokens for _, tokens in done] == [1024] * 4 + [2048] * 2
    assert len(set(done)) == 6
    distilled = [row for row in table if "distilled" in row]
    assert [len(row["distilled"]) for row in distilled] == [2, 2, 1, 1]
    first = [row["distilled"]["1024"] for row in distilled]
    assert max(first[:2]) <= min(first[2:])
    last = [row["distilled"]["2048"] for row in distilled[:2]]
    assert last == sorted(last)
    assert [row["chosen"] for row in table] == [True, *[False] * (len(table) - 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing is left beside it
    search_in(place, out)
    assert len(done) == 6


def test_the_kl_is_that_of_the_distillation(place: Path, tmp_path: Path) -> None:
    data = data_of(place / "text.jsonl")
    from regrow.checkpoint import Checkpoint
    from regrow.profile_folder import Profile

    checkpoint, profile = Checkpoint(place / "model"), Profile(place / "profile")
    score = halving.Distillations(checkpoint, profile, CONFIG, data, OPTIONS, tmp_path)
    row = {"name": "mlp", "sizes": {"mlp": 100}, "format": "bf16"}
    kl = score(row, 1024)
    manifest = read(tmp_path / "mlp100-bf16-distilled")
    assert manifest is not None
    figures = {figure["name"]: figure["value"] for figure in manifest["figures"]}
    assert kl == figures["held-out KL"] <= figures["held-out KL before"]
    score.drop(row)
    assert [path.name for path in tmp_path.iterdir()] == ["rungs.json"]
    assert score(row, 1024) == kl
