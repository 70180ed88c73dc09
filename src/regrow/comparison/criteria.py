"""Importance criteria side by side: the same cut by each, untrained, without and with repair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.comparison.head_removal import check_heads, heads_table, remove_heads
from regrow.comparison.reestimate import choose_in_rounds, steps_towards
from regrow.data import DataConfig
from regrow.errors import UserError
from regrow.manifest import write_json
from regrow.options import Options
from regrow.plan import Plan
from regrow.progress import say
from regrow.search import check_keep_params
from regrow.stages.prune import PruneConfig
from regrow.stages.prune.choose import choose, full_sizes
from regrow.stages.prune.stage import repair_method
from regrow.statistics import Profile
from regrow.trial import Trial


@dataclass(frozen=True)
class LineUp:
    """What a comparison compares: the criteria, at which sizes, and the rounds of re-estimation."""

    criteria: list[str]
    sizes: dict[str, int]
    after: dict[str, int]
    only_layers: bool
    steps: list[dict[str, int]]
    """Sizes after each round of the re-estimated row; one or none: there is no such row."""


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
    """Cut to `config`'s sizes (keep_params: from the MLPs or experts) by each of its criteria.

    Returns, prints and, to the JSON file `out`, writes a row for each: criterion, and KL to the
    dense model in nats per token without and with repair, on calibration text that was not
    profiled. Criteria for layers are compared where only layers are cut. With `rounds` > 1 there is
    a row more: `config`'s own criterion, re-estimated in so many rounds. With `heads` > 0 a second
    table: one query head removed, the least important by each criterion and at random, that often.
    Raises UserError for an impossible target and a profile of another model.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    found = profile if isinstance(profile, Profile) else Profile(profile)
    options = options or Options()
    if out is not None and Path(out).is_dir():
        raise UserError(f"{out} is a folder: give --out the name of a JSON file")
    what = line_up(checkpoint, found, config, rounds, heads)
    trial = Trial(checkpoint, found, data, options)
    rows: list[dict[str, Any]] = []
    for name in what.criteria:
        plan = _choose(checkpoint, found, config, what, name)
        rows.append({"criterion": name, **_cost(trial, plan, config)})
        _tell(rows[-1])
    if len(what.steps) > 1:
        plan = choose_in_rounds(checkpoint, found, data, config, what.steps, options)
        name = config.layer_criterion if what.only_layers else config.criterion
        rows.append({"criterion": name, **_cost(trial, plan, config), "rounds": len(what.steps)})
        _tell(rows[-1])
    rows.sort(key=lambda row: row.get("kl_repaired", row["kl"]))
    family = families.of(checkpoint)
    share = family.count(checkpoint.config, what.after) / family.count(checkpoint.config)
    _print(rows, f"{share:.1%} kept: {what.sizes}")
    table: dict[str, Any] = {"sizes": what.sizes, "keep": share, "rows": rows}
    if heads > 0:
        table["heads"] = remove_heads(trial, heads)
        Console().print(heads_table(table["heads"], heads))
    if out is not None:
        write_json(Path(out), table)
    return rows


def line_up(
    checkpoint: Checkpoint, profile: Profile, config: PruneConfig, rounds: int, heads: int
) -> LineUp:
    """What will be compared; raises UserError, before any slow work, for what cannot be."""
    profile.check_fingerprint(checkpoint)
    if rounds < 1 or heads < 0:
        raise UserError(f"rounds {rounds}, heads {heads}: give 1 or more rounds, 0 or more heads")
    shapes = check_keep_params(checkpoint, config)
    sizes = (config.with_sizes(shapes[0].sizes) if shapes else config).sizes()
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
    if not cut:
        raise UserError(f"nothing to compare at: the model has these sizes already ({sizes})")
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
    return LineUp(names, sizes, after, cut == {"layers"}, steps)


def title(row: dict[str, Any]) -> str:
    """A row's name in a table."""
    if "rounds" not in row:
        return str(row["criterion"])
    return f"{row['criterion']}, re-estimated in {row['rounds']} rounds"


def _choose(
    checkpoint: Checkpoint, profile: Profile, config: PruneConfig, what: LineUp, criterion: str
) -> Plan:
    layer_criterion = criterion if what.only_layers else config.layer_criterion
    family, multiple = families.of(checkpoint), config.multiple_of
    return choose(checkpoint, family, profile, what.sizes, criterion, layer_criterion, multiple)


def _cost(trial: Trial, plan: Plan, config: PruneConfig) -> dict[str, float]:
    row = {"kl": trial.kl(plan)}
    if config.repair:
        row["kl_repaired"] = trial.kl(plan, config)
    return row


def _tell(row: dict[str, Any]) -> None:
    figures = [f"{name} {row[name]:.3f}" for name in ("kl", "kl_repaired") if name in row]
    say(f"compare: {title(row):<16} " + "  ".join(figures))


def _print(rows: list[dict[str, Any]], heading: str) -> None:
    table = Table("criterion", "KL, nats", "KL repaired", title=heading, title_justify="left")
    for row in rows:
        values = [row["kl"], row.get("kl_repaired")]
        table.add_row(title(row), *("–" if v is None else f"{v:.3f}" for v in values))
    Console().print(table)
