"""Importance criteria side by side: the same cut by each, untrained, without and with repair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.data import DataConfig
from regrow.errors import UserError
from regrow.manifest import write_json
from regrow.options import Options
from regrow.progress import say
from regrow.search import check_keep_params, with_sizes
from regrow.stages.prune import PruneConfig
from regrow.stages.prune.choose import choose, full_sizes
from regrow.statistics import Profile
from regrow.trial import Trial


def compare(
    model: str | Path | Checkpoint,
    profile: str | Path | Profile,
    data: DataConfig,
    config: PruneConfig,
    out: str | Path | None = None,
    options: Options | None = None,
) -> list[dict[str, Any]]:
    """Cut to `config`'s sizes (keep_params: from the MLPs or experts) by each of its criteria.

    Returns, prints and, to the JSON file `out`, writes a row for each: criterion, and KL to the
    dense model in nats per token without and with repair, on calibration text that was not
    profiled. Criteria for layers are compared where only layers are cut. Raises UserError for an
    impossible target and a profile of another model.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    found = profile if isinstance(profile, Profile) else Profile(profile)
    found.check_fingerprint(checkpoint)
    if out is not None and Path(out).is_dir():
        raise UserError(f"{out} is a folder: give --out the name of a JSON file")
    shapes = check_keep_params(checkpoint, config)
    sizes = (with_sizes(config, shapes[0].sizes) if shapes else config).sizes()
    if not sizes:
        raise UserError("nothing to compare at: give keep_params, or sizes such as num_layers")
    family = families.of(checkpoint)
    before = family.sizes(checkpoint.config)
    after = full_sizes(family, before, sizes)
    cut = {dim for dim in before if after[dim] != before[dim]}
    names = found.criteria(cut - {"layers"} or {"layers"})
    trial = Trial(checkpoint, found, data, options or Options())
    rows: list[dict[str, Any]] = []
    for name in names:
        layer_criterion = name if cut == {"layers"} else config.layer_criterion
        plan = choose(checkpoint, family, found, sizes, name, layer_criterion, config.multiple_of)
        row: dict[str, Any] = {"criterion": name, "kl": trial.kl(plan, None)}
        if cut != {"layers"} and found.info["grams"]:
            row["kl_repaired"] = trial.kl(plan)
        rows.append(row)
        say(f"compare: {name:<16} " + "  ".join(f"{k} {v:.3f}" for k, v in list(row.items())[1:]))
    rows.sort(key=lambda row: row.get("kl_repaired", row["kl"]))
    share = family.count(checkpoint.config, after) / family.count(checkpoint.config)
    _print(rows, f"{share:.1%} kept: {sizes}")
    if out is not None:
        write_json(Path(out), {"sizes": sizes, "keep": share, "rows": rows})
    return rows


def _print(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("criterion", "KL, nats", "KL repaired", title=title, title_justify="left")
    for row in rows:
        values = [row["kl"], row.get("kl_repaired")]
        table.add_row(row["criterion"], *("–" if v is None else f"{v:.3f}" for v in values))
    Console().print(table)
