"""Compare importance criteria: the same cut by each, untrained, without and with repair.

One row can prune in rounds: each round makes an equal part of the cut, and the next round uses a
new profile of the smaller model. The plans of the rounds are merged, so that the result can be
compared with any other cut.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.config import Options
from regrow.cost import FORWARD, seconds_for
from regrow.data import DataConfig
from regrow.errors import UserError
from regrow.families import Family
from regrow.plan import Plan, compose
from regrow.profile_folder import Profile
from regrow.pruning.choose import choose, full_sizes
from regrow.pruning.config import PruneConfig
from regrow.pruning.cut import cut_folder
from regrow.pruning.prune import repair_method, repair_setup, try_repair
from regrow.runtime import distributed
from regrow.runtime.progress import clock, say
from regrow.search.score import SCORED_SEQUENCES, CutScorer
from regrow.search.shapes import check_keep_params
from regrow.stage_dir import output_file, write_json
from regrow.stages.compare.head_removal import check_heads, heads_table, remove_heads
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.importance import reads_grams
from regrow.stages.profile.stage import profile as measure

SMOOTH = ("layers", "mlp", "kv_heads", "experts", "expert_mlp")
"""Dimensions that can be cut by any number; heads and hidden are rounded, others cut last."""


def steps_towards(
    family: Family, config: dict[str, Any], after: dict[str, int], rounds: int
) -> list[dict[str, int]]:
    """All sizes after each round, from a model of this `config` to `after` in equal parts.

    There are fewer than `rounds` if intermediate sizes are not legal or do not differ.
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
    """One plan for `checkpoint` to the last of `steps`, by `config`'s criteria in each round.

    The first round uses `profile`. Each later round uses a new profile of the smaller model,
    repaired by the settings of `config`, on the same amount of the same text.
    """
    family = families.of(checkpoint)
    criteria = (config.criterion, config.layer_criterion)
    of_experts = config.expert_criterion
    plan = choose(checkpoint, family, profile, steps[0], *criteria, expert_criterion=of_experts)
    for number, step in enumerate(steps[1:], start=2):
        say(f"compare: round {number} of {len(steps)}, by a new profile")
        with tempfile.TemporaryDirectory(prefix="regrow-") as folder:
            left = _cut(checkpoint, profile, plan, Path(folder) / "model", config, options)
            wanted = _profile_config(profile, config, {d for d in step if step[d] != plan.after[d]})
            again = measure(left, data, Path(folder) / "profile", wanted, options)
            later = choose(left, family, again, step, *criteria, expert_criterion=of_experts)
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
    trial = try_repair(repair_setup(checkpoint, profile, plan, config, work, options), config)
    cut_folder(checkpoint, plan, folder, replace=trial.accepted)
    return Checkpoint(folder)


def _profile_config(profile: Profile, config: PruneConfig, cut: set[str]) -> ProfileConfig:
    """The profile config of the next round, with criteria for the dimensions that it cuts."""
    criteria = [config.layer_criterion] if "layers" in cut else []
    criteria += [config.criterion] if cut - {"layers"} else []
    if "experts" in cut and config.expert_criterion is not None:
        criteria += [name for name in [config.expert_criterion] if name not in criteria]
    info = profile.info
    fields: dict[str, Any] = {"criteria": tuple(criteria), "samples": info["samples"]}
    fields["gram_tokens"] = info["gram_tokens"] if reads_grams(ProfileConfig(**fields)) else 0
    if info["grams"]:
        fields |= {"grams": tuple(info["grams"]), "token_weight": info["token_weight"]}
    return ProfileConfig(**fields)


@dataclass(frozen=True)
class ComparisonPlan:
    """The criteria of a comparison, the sizes after the cut, and the rounds of re-estimation."""

    criteria: list[str]
    sizes: dict[str, int]
    after: dict[str, int]
    only_layers: bool
    steps: list[dict[str, int]]
    """Sizes after each round of the re-estimated row; with fewer than two there is no such row."""


def compare(
    model: str | Path | Checkpoint,
    profile: str | Path | Profile,
    data: DataConfig,
    config: PruneConfig,
    out: str | Path | None = None,
    options: Options | None = None,
    rounds: int = 1,
    heads: int = 0,
) -> list[dict[str, Any]]:
    """Cut to `config`'s sizes (keep_params: cut MLPs or experts) by each criterion of the profile.

    Prints and returns a row for each criterion, and writes the rows to the JSON file `out`. A row
    has the KL to the dense model in nats per token, without and with repair, on calibration text
    that was not profiled. If only layers are cut, criteria for layers are compared. With `rounds` >
    1 there is one more row: `config`'s own criterion, re-estimated in that many rounds. With
    `heads` > 0 there is a second table, for the removal of one query head: the least important by
    each criterion, and random heads, drawn that many times.
    Raises UserError for an impossible target, and for a profile of another model.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    measured = profile if isinstance(profile, Profile) else Profile(profile)
    options = options or Options()
    out = None if out is None else output_of(out)
    comparison = comparison_plan(checkpoint, measured, config, rounds, heads)
    scorer = CutScorer(checkpoint, measured, data, options)
    own: dict[str, dict[str, Any]] = {}
    for name in distributed.share(comparison.criteria):
        plan = _choose(checkpoint, measured, config, comparison, name)
        own[name] = {"criterion": name, **_cost(scorer, plan, config)}
        _show(own[name])
    scored = distributed.merged(own)
    rows = [scored[name] for name in comparison.criteria]
    if len(comparison.steps) > 1:

        def re_estimated() -> dict[str, Any]:
            plan = choose_in_rounds(checkpoint, measured, data, config, comparison.steps, options)
            name = config.layer_criterion if comparison.only_layers else config.criterion
            cost = _cost(scorer, plan, config)
            return {"criterion": name, **cost, "rounds": len(comparison.steps)}

        rows.append(distributed.on_first(re_estimated))
        _show(rows[-1])
    rows.sort(key=lambda row: row.get("kl_repaired", row["kl"]))
    family = families.of(checkpoint)
    share = family.count(checkpoint.config, comparison.after) / family.count(checkpoint.config)
    table: dict[str, Any] = {"sizes": comparison.sizes, "keep": share, "rows": rows}
    if heads > 0:
        table["heads"] = distributed.on_first(partial(remove_heads, scorer, heads))
    if distributed.is_main():
        _print(rows, f"{share:.1%} kept: {comparison.sizes}")
        if heads > 0:
            Console().print(heads_table(table["heads"], heads))
        if out is not None:
            write_json(out, table)
    return rows


def output_of(out: str | Path) -> Path:
    """The file to write; raises UserError for a file that is no table of `compare`."""
    return output_file(Path(out), ("compare", _is_table))


def _is_table(content: bytes) -> bool:
    try:
        table = json.loads(content)
    except ValueError:
        return False
    return isinstance(table, dict) and {"sizes", "keep", "rows"} <= table.keys()


def comparison_plan(
    checkpoint: Checkpoint, profile: Profile, config: PruneConfig, rounds: int, heads: int
) -> ComparisonPlan:
    """The plan of a comparison; raises UserError, before any slow work, if it is impossible."""
    profile.check_fingerprint(checkpoint)
    if rounds < 1 or heads < 0:
        raise UserError(f"rounds {rounds}, heads {heads}: give 1 or more rounds, 0 or more heads")
    shapes = [shape for shape in check_keep_params(checkpoint, config) if shape.sizes]
    sizes = (config.with_sizes(shapes[0].sizes, config.format) if shapes else config).sizes()
    if not sizes:
        raise UserError("nothing to compare at: give keep_params, or sizes such as num_layers")
    if "vocab" in sizes:
        raise UserError(
            f"vocab_size {sizes['vocab']}: criteria are compared on the same tokens; leave it out"
        )
    family = families.of(checkpoint)
    before = family.sizes(checkpoint.config)
    after = full_sizes(family, before, sizes)
    cut = {dim for dim in before if after[dim] != before[dim]}
    if heads > 0:
        check_heads(profile)
    if config.repair:
        repair_method(config, profile)
    steps: list[dict[str, int]] = []
    if rounds > 1:
        for dim in sorted(cut):
            profile.scores(config.layer_criterion if dim == "layers" else config.criterion, dim)
        steps = steps_towards(family, checkpoint.config, after, rounds)
        if len(steps) < rounds:
            say(f"compare: this cut can be made in {len(steps)} rounds, not in {rounds}")
    names = profile.criteria(cut - {"layers"} or {"layers"})
    return ComparisonPlan(names, sizes, after, cut == {"layers"}, steps)


def title(row: dict[str, Any]) -> str:
    """A row's name in a table."""
    if "rounds" not in row:
        return str(row["criterion"])
    return f"{row['criterion']}, re-estimated in {row['rounds']} rounds"


def _choose(
    checkpoint: Checkpoint,
    profile: Profile,
    config: PruneConfig,
    comparison: ComparisonPlan,
    criterion: str,
) -> Plan:
    layer_criterion = criterion if comparison.only_layers else config.layer_criterion
    family, multiple = families.of(checkpoint), config.multiple_of
    return choose(
        checkpoint, family, profile, comparison.sizes, criterion, layer_criterion, multiple
    )


def _cost(scorer: CutScorer, plan: Plan, config: PruneConfig) -> dict[str, float]:
    row = {"kl": scorer.kl(plan)}
    if config.repair:
        row["kl_repaired"] = scorer.kl(plan, config)
    return row


def _show(row: dict[str, Any]) -> None:
    figures = [f"{name} {row[name]:.3f}" for name in ("kl", "kl_repaired") if name in row]
    say(f"compare: {title(row):<16} " + "  ".join(figures))


def _print(rows: list[dict[str, Any]], heading: str) -> None:
    table = Table("criterion", "KL, nats", "KL repaired", title=heading, title_justify="left")
    for row in rows:
        values = [row["kl"], row.get("kl_repaired")]
        table.add_row(title(row), *("–" if v is None else f"{v:.3f}" for v in values))
    Console().print(table)


def estimate(
    checkpoint: Checkpoint,
    folder: Path,
    data: DataConfig,
    config: PruneConfig,
    rounds: int,
    heads: int,
) -> list[str]:
    """Describe the criteria, the cut, the text and the time of a comparison."""
    profile = Profile(folder)
    comparison = comparison_plan(checkpoint, profile, config, rounds, heads)
    family = families.of(checkpoint)
    before, after = (family.count(checkpoint.config, sizes) for sizes in (None, comparison.after))
    tokens = SCORED_SEQUENCES * data.sequence_length
    rows = len(comparison.criteria) + (len(comparison.steps) > 1)
    passes = 1 + rows * (2 if config.repair else 1)
    if heads > 0:
        passes += 1 + 2 * (len(check_heads(profile)) + heads)
    again = max(0, len(comparison.steps) - 1) * profile.info["tokens"]
    seconds = seconds_for(passes * tokens + again, FORWARD * before)
    lines = [
        f"compare: {', '.join(comparison.criteria) or 'no criterion'}",
        f"  cut to {after:,} parameters ({after / before:.1%}) {comparison.sizes}",
        f"  scored on {tokens:,} tokens of calibration text beyond the profile's",
    ]
    if len(comparison.steps) > 1:
        lines.append(
            f"  re-estimated in {len(comparison.steps)} rounds, {again:,} tokens to profile on"
        )
    if heads > 0:
        lines.append(f"  one query head removed, the least important and {heads} times at random")
    repair = ", repair on top" if config.repair else ""
    return [*lines, f"  time about {clock(seconds)} for the passes through the model{repair}"]
