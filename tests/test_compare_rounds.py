"""Importance re-estimated in rounds: the same as cutting and profiling by hand, in turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_choose import REAL
from tiny_folders import data_of
from tiny_models import NAMES, tiny_config
from tiny_pruning import OPTIONS, slow_kl, write_place

from regrow import PruneConfig, compare, families
from regrow.checkpoint import Checkpoint
from regrow.cli.main import main
from regrow.errors import UserError
from regrow.plan import Plan
from regrow.profile_folder import Profile
from regrow.pruning.choose import full_sizes
from regrow.stages.compare.stage import choose_in_rounds, steps_towards
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.stage import profile
from regrow.stages.prune.stage import prune


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def steps_of(config: dict[str, Any], rounds: int, **sizes: int) -> list[dict[str, int]]:
    family = families.get(config["model_type"])
    after = full_sizes(family, family.sizes(config), sizes)
    return steps_towards(family, config, after, rounds)


CUTS: list[dict[str, int]] = [
    {"mlp": 20},
    {"layers": 1, "mlp": 40},
    {"heads": 2},
    {"kv_heads": 1},
    {"hidden": 24},
    {"layers": 2, "hidden": 36, "mlp": 30, "heads": 2, "kv_heads": 1},
]


OF_EXPERTS: list[dict[str, int]] = [
    {"experts": 3},
    {"layers": 2, "hidden": 40, "experts": 3, "expert_mlp": 24, "heads": 2, "kv_heads": 1},
]
CASES = [
    (name, sizes) for name in NAMES for sizes in (OF_EXPERTS if families.get(name).memory else CUTS)
]


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_steps_reach_the_target_with_possible_sizes(name: str, sizes: dict[str, int]) -> None:
    config = tiny_config(name).to_dict()
    family = families.get(name)
    before = family.sizes(config)
    steps = steps_of(config, 4, **sizes)
    assert steps[-1] == full_sizes(family, before, sizes)
    for earlier, later in zip([before, *steps], steps, strict=False):
        assert later != earlier
        assert all(later[dim] <= earlier[dim] for dim in before)
        families.check_sizes(family, config, later)


def test_steps_by_hand() -> None:
    smollm2 = REAL["smollm2"]
    assert [step["mlp"] for step in steps_of(smollm2, 4, mlp=1024)] == [1408, 1280, 1152, 1024]
    assert [step["layers"] for step in steps_of(smollm2, 3, layers=24)] == [28, 26, 24]
    groups = steps_of(smollm2, 2, kv_heads=1)
    assert [(step["kv_heads"], step["heads"]) for step in groups] == [(2, 6), (1, 3)]
    assert [step["hidden"] for step in steps_of(smollm2, 3, hidden=450)] == [531, 495, 450]
    # Three query heads for each key/value head, or two: there is nothing in between.
    assert [step["heads"] for step in steps_of(smollm2, 4, heads=6)] == [6]


@pytest.mark.parametrize("repair", [True, False])
def test_rounds_equal_pruning_and_profiling_in_turn(
    place: Path, tmp_path: Path, repair: bool
) -> None:
    """By the stages: prune, profile what is left, prune that; the plan by the first model's ids."""
    data = data_of(place / "text.jsonl")
    sizes = [
        {"num_layers": 4, "intermediate_size": 128},
        {"num_layers": 3, "intermediate_size": 96},
    ]
    checkpoint, profiled = Checkpoint(place / "model"), Profile(place / "profile")
    target = PruneConfig(**sizes[1], repair=repair)
    steps = steps_of(checkpoint.config, 2, **target.sizes())
    assert [(step["layers"], step["mlp"]) for step in steps] == [(4, 128), (3, 96)]
    plan = choose_in_rounds(checkpoint, profiled, data, target, steps, OPTIONS)
    one_round = PruneConfig(intermediate_size=128, repair=repair)
    first = prune(checkpoint, tmp_path / "first", one_round, profiled)
    profile_config = ProfileConfig(samples=24, gram_tokens=24 * 32)
    measured = profile(first, data, tmp_path / "profile", profile_config, OPTIONS)
    second = prune(first, tmp_path / "second", target, measured)
    assert plan == Plan.read(second / "plan-from-first.json")
    at_once = prune(checkpoint, tmp_path / "at_once", target, profiled)
    assert plan.mlp != Plan.read(at_once / "plan.json").mlp


def test_the_row_is_what_that_plan_costs(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, target = data_of(place / "text.jsonl"), PruneConfig(intermediate_size=64)
    out = tmp_path / "table.json"
    rows = compare(place / "model", place / "profile", data, target, out, OPTIONS, rounds=3)
    (row,) = [row for row in rows if "rounds" in row]
    assert (row["criterion"], row["rounds"], len(rows)) == ("activation_l2", 3, 2)
    assert "activation_l2, re-estimated in 3 rounds" in " ".join(capsys.readouterr().out.split())
    assert json.loads(out.read_text())["rows"] == rows
    checkpoint, profile = Checkpoint(place / "model"), Profile(place / "profile")
    steps = steps_of(checkpoint.config, 3, mlp=64)
    choose_in_rounds(checkpoint, profile, data, target, steps, OPTIONS).write(
        tmp_path / "plan.json"
    )
    for repair in (False, True):
        config = PruneConfig(plan=str(tmp_path / "plan.json"), repair=repair)
        cut = prune(checkpoint, tmp_path / str(repair), config, profile)
        expected = slow_kl(place, Checkpoint(cut).model(torch.float32))
        assert row["kl_repaired" if repair else "kl"] == pytest.approx(expected, rel=0.03)


def test_layers_are_re_estimated_by_their_criterion(place: Path) -> None:
    data, target = data_of(place / "text.jsonl"), PruneConfig(num_layers=2)
    rows = compare(place / "model", place / "profile", data, target, options=OPTIONS, rounds=2)
    assert [(row["criterion"], row.get("rounds")) for row in sorted(rows, key=len)] == [
        ("block_influence", None),
        ("block_influence", 2),
    ]


def test_a_single_round_is_reported_and_skipped(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, target = data_of(place / "text.jsonl"), PruneConfig(num_layers=3)
    rows = compare(place / "model", place / "profile", data, target, options=OPTIONS, rounds=2)
    assert [row.get("rounds") for row in rows] == [None]
    assert "can be made in 1 rounds, not in 2" in capsys.readouterr().err


def test_targets_that_cannot_be_re_estimated_are_refused_first(place: Path) -> None:
    data, target = data_of(place / "text.jsonl"), PruneConfig(num_layers=2)
    arguments = (place / "model", place / "profile", data)
    with pytest.raises(UserError, match="rounds 0, heads 0: give 1 or more"):
        compare(*arguments, target, options=OPTIONS, rounds=0)
    fisher = PruneConfig(intermediate_size=64, criterion="fisher")
    with pytest.raises(UserError, match="has no 'fisher' scores for mlp"):
        compare(*arguments, fisher, options=OPTIONS, rounds=2)
    depth_only = PruneConfig(num_layers=4)
    with pytest.raises(UserError, match="the model has that already"):
        compare(*arguments, depth_only, options=OPTIONS)


def test_a_dry_run_describes_the_rounds(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would be compared, on what; nothing is written or run."""
    arguments = ["compare", str(place / "model"), "--profile", str(place / "profile")]
    arguments += ["--data", str(place / "text.jsonl"), "--sequence-length", "32", "--dry-run"]
    arguments += ["--intermediate-size", "64", "--rounds", "3", "--heads", "5"]
    assert main([*arguments, "--out", str(tmp_path / "table.json")]) == 0
    output = capsys.readouterr().out
    assert output.startswith("compare: activation_l2\n")
    assert "{'mlp': 64}" in output
    assert "scored on 256 tokens" in output
    assert "in 3 rounds, 1,536 tokens to profile on" in output
    assert "the least important and 5 times at random" in output
    assert not list(tmp_path.iterdir())
    assert main([*arguments, "--num-layers", "5"]) == 2
    assert "num_hidden_layers 5: allowed are 1 to 4" in capsys.readouterr().err
