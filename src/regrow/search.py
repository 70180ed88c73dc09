"""Choice of shape: cut every candidate in memory, score it untrained, keep the best.

A first version: a handful of shapes, scored by KL to the dense model on calibration text that was
not profiled. It stands above the stages, because it joins cutting and measuring.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.data import DataConfig
from regrow.data.digest import data_digest
from regrow.errors import UserError
from regrow.manifest import Stage, digest, read
from regrow.options import Options
from regrow.progress import say
from regrow.stages.prune import PruneConfig
from regrow.stages.prune.choose import choose
from regrow.stages.prune.shapes import Shape, candidates
from regrow.stages.prune.stage import check_target
from regrow.stages.prune.stage import prune as prune_to
from regrow.statistics import Profile
from regrow.trial import Trial

RIDGE = (1e-1,)  # one ridge strength is enough to rank shapes


def prune(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: PruneConfig,
    profile: str | Path | Profile | None = None,
    data: DataConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Prune to a share of the parameters (the shape is searched for), to sizes, or by a plan.

    Raises UserError for an impossible target and for keep_params without `data` to choose on.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    if config.keep_params is None:
        return prune_to(checkpoint, out, config, profile)
    if profile is None:
        raise UserError("keep_params needs a profile: make one with regrow profile, give --profile")
    found = profile if isinstance(profile, Profile) else Profile(profile)
    shapes = check_keep_params(checkpoint, config)
    asked = digest(config.model_dump(mode="json"), None if data is None else data_digest(data))
    table = _earlier_choice(Path(out), asked, checkpoint, found, config)
    if table is None:
        if len(shapes) > 1 and data is None:
            raise UserError("keep_params needs data to choose a shape on: give --data, or sizes")
        table = choose_shape(checkpoint, shapes, found, config, data, options or Options())
    chosen = next(row for row in table if row["chosen"])
    sizes = with_sizes(config, chosen["sizes"])
    return prune_to(checkpoint, out, sizes, found, extra={"candidates": table}, search=asked)


def check_keep_params(checkpoint: Checkpoint, config: PruneConfig) -> list[Shape]:
    """The candidate shapes for `config.keep_params`; raises UserError when none meets it."""
    if config.keep_params is None:
        check_target(checkpoint, config)
        return []
    if config.sizes() or config.plan:
        raise UserError("give keep_params, or sizes, or a plan: one of them")
    family = families.of(checkpoint)
    return candidates(family, checkpoint.config, config.keep_params, config.multiple_of)


def with_sizes(config: PruneConfig, sizes: dict[str, int]) -> PruneConfig:
    """`config` with explicit sizes by dimension in place of keep_params."""
    keys = {"layers": "num_layers", "hidden": "hidden_size", "mlp": "intermediate_size"}
    keys |= {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    named = {keys[dim]: size for dim, size in sizes.items()}
    return config.model_copy(update={"keep_params": None, **named})


def choose_shape(
    checkpoint: Checkpoint,
    shapes: list[Shape],
    profile: Profile,
    config: PruneConfig,
    data: DataConfig | None,
    options: Options,
) -> list[dict[str, Any]]:
    """Score the shapes, print and return the table: name, sizes, parameters, keep, kl, chosen."""
    family = families.of(checkpoint)
    total = family.count(checkpoint.config)
    rows: list[dict[str, Any]] = []
    trial = None
    if data is not None and len(shapes) > 1:
        trial = Trial(checkpoint, profile, data, options)
    for shape in shapes:
        kl = 0.0
        if trial is not None:
            start = time.monotonic()
            plan = choose(
                checkpoint, family, profile, shape.sizes, config.criterion, config.layer_criterion
            )
            kl = trial.kl(plan, RIDGE if config.repair else None)
            say(
                f"search: {shape.name:<16} {shape.parameters / total:6.1%} kept  "
                f"KL {kl:.3f} nats  ({time.monotonic() - start:.0f} s)  {shape.sizes}"
            )
        rows.append(
            {
                "name": shape.name,
                "sizes": shape.sizes,
                "parameters": shape.parameters,
                "keep": shape.parameters / total,
                "kl": kl,
                "chosen": False,
            }
        )
    best = min(rows, key=lambda row: row["kl"] if math.isfinite(row["kl"]) else math.inf)
    best["chosen"] = True
    say(f"search: chose {best['name']}")
    return rows


def _earlier_choice(
    out: Path, asked: str, checkpoint: Checkpoint, profile: Profile, config: PruneConfig
) -> list[dict[str, Any]] | None:
    """The table of an earlier run of this very search, so that a resumed job need not repeat it."""
    found, path = read(out), out / "candidates.json"
    if found is None or not path.exists():
        return None
    inputs = found.get("inputs", {})
    known = {"search": asked, "model": checkpoint.fingerprint, "profile": digest(profile.info)}
    if any(inputs.get(name) != value for name, value in known.items()):
        return None
    table: list[dict[str, Any]] = json.loads(path.read_text())
    chosen = next(row for row in table if row["chosen"])
    stage = Stage(out, "prune", with_sizes(config, chosen["sizes"]), inputs)
    return table if stage.complete else None
