"""Criteria side by side: each row is what pruning by that criterion gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_folders import data_of, write_model
from tiny_pruning import OPTIONS, slow_kl, write_place

from regrow import PruneConfig, compare
from regrow.checkpoint import Checkpoint
from regrow.cli.main import main
from regrow.errors import UserError
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.stage import profile
from regrow.stages.prune.stage import prune

CRITERIA = ("activation_l2", "magnitude", "taylor", "obs", "block_influence", "random")
SMALL = PruneConfig(intermediate_size=96)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_place(tmp_path_factory.mktemp("place"))
    config = ProfileConfig(criteria=CRITERIA, samples=24, gram_tokens=24 * 32)
    data = data_of(folder / "text.jsonl")
    profile(folder / "model", data, folder / "all", config, OPTIONS)
    return folder


@pytest.mark.parametrize("target", [SMALL, PruneConfig(num_layers=3)])
def test_a_row_is_what_pruning_by_its_criterion_costs(
    place: Path, tmp_path: Path, target: PruneConfig
) -> None:
    data, widths = data_of(place / "text.jsonl"), target.num_layers is None
    rows = compare(place / "model", place / "all", data, target, options=OPTIONS)
    names = CRITERIA[:4] + CRITERIA[5:] if widths else ("block_influence", "random", "taylor")
    assert {row["criterion"] for row in rows} == set(names)
    for row in rows:
        key = "criterion" if widths else "layer_criterion"
        for repair in (False, True):
            config = target.model_copy(update={key: row["criterion"], "repair": repair})
            out = prune(place / "model", tmp_path / str(repair), config, place / "all")
            kl = row["kl_repaired" if repair else "kl"]
            assert kl == pytest.approx(
                slow_kl(place, Checkpoint(out).model(torch.float32)), rel=0.03
            )
    best = [row.get("kl_repaired", row["kl"]) for row in rows]
    assert best == sorted(best)


def test_the_command_prints_and_writes_the_table(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.json"
    arguments = ["compare", str(place / "model"), "--profile", str(place / "all")]
    arguments += ["--data", str(place / "text.jsonl"), "--sequence-length", "32"]
    assert main([*arguments, "--keep-params", "0.8", "--multiple-of", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert abs(rows["keep"] - 0.8) <= 0.01
    assert list(rows["sizes"]) == ["mlp"]
    printed = capsys.readouterr().out
    assert all(f"{row['criterion']} " in printed for row in rows["rows"])
    assert f"{rows['rows'][0]['kl_repaired']:.3f}" in printed


def test_a_foreign_file_is_never_replaced(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.json"
    arguments = ["compare", str(place / "model"), "--profile", str(place / "all"), "--data"]
    arguments += [str(place / "text.jsonl"), "--sequence-length", "32", "--intermediate-size", "96"]
    for foreign in ('{"rows": [], "name": "app"}', "notes", "[1]"):
        out.write_text(foreign)
        for more in ([], ["--dry-run"]):
            assert main([*arguments, "--out", str(out), *more]) == 2
            assert f"{out} exists and was not written by regrow compare" in capsys.readouterr().err
        assert out.read_text() == foreign
    out.write_text('{"sizes": {}, "keep": 0.5, "rows": []}')
    assert main([*arguments, "--out", str(out), "--dry-run"]) == 0


def test_bad_comparisons_are_refused(place: Path, tmp_path: Path) -> None:
    data = data_of(place / "text.jsonl")
    with pytest.raises(UserError, match="nothing to compare at"):
        compare(place / "model", place / "all", data, PruneConfig(), options=OPTIONS)
    odd = PruneConfig(intermediate_size=97)
    with pytest.raises(UserError, match="intermediate_size 97"):
        compare(place / "model", place / "all", data, odd, options=OPTIONS)
    with pytest.raises(UserError, match="is a folder"):
        compare(place / "model", place / "all", data, SMALL, out=tmp_path, options=OPTIONS)
    write_model(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(UserError, match="profile of another model"):
        compare(tmp_path / "other", place / "all", data, SMALL, options=OPTIONS)
