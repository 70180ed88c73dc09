"""The prune stage: cut a checkpoint to sizes, by a plan, or to a target by a shape search."""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from regrow.checkpoint import Checkpoint, load
from regrow.config import Options
from regrow.cost.units import size_text
from regrow.data import DataConfig
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.profile_folder import Profile
from regrow.pruning.config import PLAIN, PruneConfig
from regrow.pruning.prune import Search, prune_to_sizes, repair_method
from regrow.runtime import distributed
from regrow.runtime.progress import say
from regrow.search.shapes import check_keep_params, named, to_try
from regrow.sparsity.zeros import refuse_filling
from regrow.stage_dir import StageDir, digest, read
from regrow.stages.prune import FILLS_ZEROS
from regrow.stages.prune.choose_shape import choose_shape, remove_models


def prune(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: PruneConfig,
    profile: str | Path | Profile | None = None,
    data: DataConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Prune to a target (by a shape search), to sizes, or by a plan.

    Targets are keep_params and the limits max_bytes, max_ram, max_prefill_ms and max_decode_ms;
    several must all be met. The processes of a job share the shapes that a search scores; the first
    one alone cuts and repairs. Raises UserError for an impossible target, and for a search without
    `data`.
    """
    out = Path(out)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    if config.repair:
        refuse_filling(checkpoint, "repair", FILLS_ZEROS)
    if not config.searches:
        return distributed.on_first(
            partial(prune_to_sizes, checkpoint, out, config, profile, options=options)
        )
    if profile is None:
        raise UserError(
            f"{named(config)} needs a profile: make one with regrow profile, give --profile"
        )
    measured = profile if isinstance(profile, Profile) else Profile(profile)
    shapes = check_keep_params(checkpoint, config)
    if config.repair:
        repair_method(config, measured)
    asked = digest(config.model_dump(mode="json"), None if data is None else data_digest(data))
    scratch = out.parent / f".{out.name}.search"
    earlier = partial(_earlier_choice, out, asked, checkpoint, measured, config)
    table, begun = distributed.from_first(earlier), time.monotonic()
    searched = table is None
    if table is None:
        if to_try(config, shapes) and data is None:
            raise UserError(
                f"{named(config)} needs data to choose a shape on: give --data, or sizes"
            )
        given = (checkpoint, shapes, measured, config, data, options or Options(), scratch)
        table = choose_shape(*given)
    chosen = next(row for row in table if row["chosen"])
    if not chosen["sizes"]:
        distributed.on_first(partial(remove_models, scratch))
        raise _whole_is_best(table, config)
    sizes = config.with_sizes(chosen["sizes"], chosen["format"])
    extra = dict[str, object](candidates=table)
    search = Search(asked, time.monotonic() - begun if searched else None)
    cut = partial(prune_to_sizes, checkpoint, out, sizes, measured, extra, search, options)
    distributed.on_first(cut)
    if distributed.is_main():
        shutil.rmtree(scratch, ignore_errors=True)
    if config.formats and chosen["format"] != PLAIN:
        say(
            f"prune: the size is that in {chosen['format']}: distil, and then run regrow quantize "
            f"with --scheme {chosen['format']}"
        )
    return out


def _whole_is_best(table: list[dict[str, Any]], config: PruneConfig) -> UserError:
    """The error for a search in which the whole model in some format is better than every cut."""
    whole, cut = table[0], next(row for row in table if row["sizes"])

    def told(row: dict[str, Any]) -> str:
        kl = [row["kl"], *row.get("distilled", {}).values()][-1]
        return f"{row['name']}, {size_text(row['bytes'])}, KL {kl:.3f}"

    smallest = min(row["bytes"] for row in table if not row["sizes"])
    return UserError(
        f"{named(config)}: pruning does not pay: {told(whole)}; the best cut is {told(cut)}. Run "
        f"regrow quantize with --scheme {whole['format']}, or give less than "
        f"{smallest / 1e6:,.1f} MB"
    )


def _earlier_choice(
    out: Path, asked: str, checkpoint: Checkpoint, profile: Profile, config: PruneConfig
) -> list[dict[str, Any]] | None:
    """The table of an earlier run of the same search, so that a resumed job can skip it."""
    manifest, path = read(out), out / "candidates.json"
    if manifest is None or not path.exists():
        return None
    inputs = manifest.get("inputs", {})
    known = {"search": asked, "model": checkpoint.fingerprint, "profile": digest(profile.info)}
    if any(inputs.get(name) != value for name, value in known.items()):
        return None
    table: list[dict[str, Any]] = json.loads(path.read_text())
    chosen = next(row for row in table if row["chosen"])
    sizes = config.with_sizes(chosen["sizes"], chosen["format"])
    stage = StageDir(out, "prune", sizes, inputs)
    return table if stage.complete else None
