"""Importance estimated anew after each round of a cut, instead of once before all of it.

Each round cuts an equal part of the way; the next one goes by a profile of what is left. The plans
of the rounds compose to one, so that the result can be compared with any other cut.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from regrow import families, plugins
from regrow.checkpoint import Checkpoint
from regrow.data import DataConfig
from regrow.families import Family
from regrow.options import Options
from regrow.plan import Plan, compose
from regrow.progress import say
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.scoring import IMPORTANCE
from regrow.stages.profile.stage import profile as measure
from regrow.stages.prune import PruneConfig
from regrow.stages.prune.choose import choose
from regrow.stages.prune.cut import cut_folder
from regrow.stages.prune.stage import repair_by
from regrow.statistics import Profile

SMOOTH = ("layers", "mlp", "kv_heads", "experts", "expert_mlp")
"""Dimensions whose way can be divided freely; heads and hidden follow, others go at the end."""


def steps_towards(
    family: Family, config: dict[str, Any], after: dict[str, int], rounds: int
) -> list[dict[str, int]]:
    """All sizes after each round, from a model of this `config` to `after` in equal parts.

    Fewer than `rounds` where the model cannot have the sizes in between, or they are the same.
    """
    before = family.sizes(config)
    group = {"before": before["heads"] // before["kv_heads"]}
    group["after"] = after["heads"] // after["kv_heads"]
    steps = [before]
    for number in range(1, rounds):
        share = number / rounds
        smooth = [dim for dim in SMOOTH if dim in before]
        step = before | {dim: _between(before[dim], after[dim], share) for dim in smooth}
        step["heads"] = step["kv_heads"] * _between(group["before"], group["after"], share)
        unit = family.step("hidden", config, heads=step["heads"], kv_heads=step["kv_heads"])
        hidden = unit * round(_between(before["hidden"], after["hidden"], share) / unit)
        step["hidden"] = min(max(hidden, after["hidden"]), before["hidden"])
        if families.can_have(family, config, step) and step not in (steps[-1], after):
            steps.append(step)
    return [*steps[1:], after]


def choose_in_rounds(
    checkpoint: Checkpoint,
    profile: Profile,
    data: DataConfig,
    config: PruneConfig,
    steps: list[dict[str, int]],
    options: Options,
) -> Plan:
    """One plan of the `checkpoint` for the last of `steps`, by `config`'s criteria before each.

    The first goes by `profile`, the others by profiles, on as much of the same text, of what is
    left by then: repaired as `config` says.
    """
    family = families.of(checkpoint)
    criteria = (config.criterion, config.layer_criterion)
    of_experts = config.expert_criterion
    plan = choose(checkpoint, family, profile, steps[0], *criteria, expert_criterion=of_experts)
    for number, step in enumerate(steps[1:], start=2):
        say(f"compare: round {number} of {len(steps)}, by a profile of what is left")
        with tempfile.TemporaryDirectory(prefix="regrow-") as folder:
            left = _cut(checkpoint, profile, plan, Path(folder) / "model", config, options)
            wanted = _profile_config(profile, config, {d for d in step if step[d] != plan.after[d]})
            found = measure(left, data, Path(folder) / "profile", wanted, options)
            later = choose(left, family, found, step, *criteria, expert_criterion=of_experts)
            plan = compose(plan, later)
    return plan


def _between(before: int, after: int, share: float) -> int:
    return round(before + (after - before) * share)


def _cut(
    checkpoint: Checkpoint,
    profile: Profile,
    plan: Plan,
    folder: Path,
    config: PruneConfig,
    options: Options,
) -> Checkpoint:
    work = folder.parent / "repair"
    replace = repair_by(checkpoint, profile, plan, config, work, options)
    cut_folder(checkpoint, plan, folder, replace=replace)
    return Checkpoint(folder)


def _profile_config(profile: Profile, config: PruneConfig, cut: set[str]) -> ProfileConfig:
    """What to measure for the next round: the criteria of the dimensions that it cuts."""
    criteria = [config.layer_criterion] if "layers" in cut else []
    criteria += [config.criterion] if cut - {"layers"} else []
    if "experts" in cut and config.expert_criterion is not None:
        criteria += [name for name in [config.expert_criterion] if name not in criteria]
    info = profile.info
    needs = {need for name in criteria for need in plugins.load(IMPORTANCE, name).NEEDS}
    fields: dict[str, Any] = {"criteria": tuple(criteria), "samples": info["samples"]}
    fields["gram_tokens"] = info["gram_tokens"] if "gram" in needs else 0
    if info["grams"]:
        fields |= {"grams": tuple(info["grams"]), "token_weight": info["token_weight"]}
    return ProfileConfig(**fields)
