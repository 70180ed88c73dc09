"""Choice of shape: cut every candidate in memory, score it untrained, keep the best.

A handful of shapes, or hundreds in rounds on more and more text, scored by KL to the dense model on
calibration text that was not profiled; then, if asked for, successive halving with short
distillations. It stands above the stages: it joins cutting, measuring and training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.data import DataConfig
from regrow.data.digest import data_digest
from regrow.errors import UserError
from regrow.families import Family
from regrow.footprint import fallbacks
from regrow.manifest import Stage, digest, read, write_json
from regrow.options import Options
from regrow.progress import say
from regrow.search.rounds import (
    HANDFUL,
    Rounds,
    Row,
    blocks_for,
    rounds_for,
    row_of,
)
from regrow.search.timing import Timing
from regrow.stages.prune import PruneConfig
from regrow.stages.prune.choose import choose, full_sizes
from regrow.stages.prune.config import TARGETS
from regrow.stages.prune.gather import SORTED, order_by
from regrow.stages.prune.shapes import Shape, candidates, grid
from regrow.stages.prune.stage import check_target, repair_method
from regrow.stages.prune.stage import prune as prune_to
from regrow.stages.prune.targets import Target, target_of
from regrow.statistics import Profile
from regrow.trial import Trial

SHOWN = 10
ROUNDS = "rounds.json"


def prune(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: PruneConfig,
    profile: str | Path | Profile | None = None,
    data: DataConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Prune to a target (the shape is searched for), to sizes, or by a plan.

    Targets are keep_params and the limits max_bytes, max_ram, max_prefill_ms and max_decode_ms;
    together they all hold. Raises UserError for an impossible target and for one without `data` to
    choose on.
    """
    out = Path(out)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    if not config.searches:
        return prune_to(checkpoint, out, config, profile, options=options)
    if profile is None:
        raise UserError(
            f"{_named(config)} needs a profile: make one with regrow profile, give --profile"
        )
    found = profile if isinstance(profile, Profile) else Profile(profile)
    shapes = check_keep_params(checkpoint, config)
    if config.repair:
        repair_method(config, found)
    asked = digest(config.model_dump(mode="json"), None if data is None else data_digest(data))
    scratch = out.parent / f".{out.name}.search"
    table = _earlier_choice(out, asked, checkpoint, found, config)
    if table is None:
        if to_try(config, shapes) and data is None:
            raise UserError(
                f"{_named(config)} needs data to choose a shape on: give --data, or sizes"
            )
        given = (checkpoint, shapes, found, config, data, options or Options(), scratch)
        table = choose_shape(*given)
    chosen = next(row for row in table if row["chosen"])
    sizes = config.with_sizes(chosen["sizes"])
    prune_to(checkpoint, out, sizes, found, {"candidates": table}, asked, options)
    shutil.rmtree(scratch, ignore_errors=True)
    return out


def check_keep_params(checkpoint: Checkpoint, config: PruneConfig) -> list[Shape]:
    """The candidate shapes for the target of `config`; raises UserError when none meets it.

    None yet for a latency, which has to be measured first.
    """
    if not config.searches:
        check_target(checkpoint, config)
        return []
    if config.sizes() or config.plan:
        raise UserError(f"give {_named(config)}, or sizes, or a plan: one of them")
    family = families.of(checkpoint)
    target = target_of(family, checkpoint.config, config)
    if config.timed:
        if target.keep_params is not None or (target.limits and not target.within({})):
            _shapes(checkpoint, config, target)
        return []
    return _shapes(checkpoint, config, target)


def to_try(config: PruneConfig, shapes: list[Shape]) -> int:
    """How many shapes are tried; 0 when there is no choice."""
    if config.timed:
        return config.num_candidates
    return len(shapes) if len(shapes) > 1 else 0


def choose_shape(
    checkpoint: Checkpoint,
    shapes: list[Shape],
    profile: Profile,
    config: PruneConfig,
    data: DataConfig | None,
    options: Options,
    scratch: Path,
) -> list[Row]:
    """Score the shapes, print and return the table, the best first.

    Rows: name, sizes, parameters, keep, bytes and ram in `format`, kl (of the last round the shape
    was in), round, chosen; of finalists prefill_ms and decode_ms; `distilled`, KL by tokens.
    """
    family = families.of(checkpoint)
    if data is None or not to_try(config, shapes):
        rows = [{**row_of(s, family, checkpoint.config, config), "kl": 0.0} for s in shapes]
    else:
        given = (checkpoint, shapes, profile, config, data, options)
        rows = _halved(*given, scratch) if config.halving_tokens else _tried(*given)
    rows[0]["chosen"] = True
    say(f"search: chose {rows[0]['name']}")
    for line in fallbacks(family, checkpoint.config, config.format, rows[0]["sizes"]):
        say(f"search: {line}")
    return rows


def _tried(
    checkpoint: Checkpoint,
    shapes: list[Shape],
    profile: Profile,
    config: PruneConfig,
    data: DataConfig,
    options: Options,
) -> list[Row]:
    """Rows with their scores, the best of the last round first, then those of earlier ones."""
    family, parent = families.of(checkpoint), checkpoint.config
    dims = _cut_by(shapes, family, parent) if shapes else _scored(profile, config.criterion)
    order = order_by(family, parent, profile, config.criterion, dims)
    blocks = blocks_for(to_try(config, shapes))
    trial = Trial(checkpoint, profile, data, options, blocks, order)
    timing, rounds = Timing(trial, config), Rounds(trial, config)

    def made(shape: Shape) -> Row:
        plan = choose(
            checkpoint,
            family,
            profile,
            shape.sizes,
            config.criterion,
            config.layer_criterion,
            expert_criterion=config.expert_criterion,
        )
        return {**row_of(shape, family, parent, config), "plan": plan}

    if config.timed and family.memory:
        raise UserError(
            f"{_named(config)}: a mixture of experts is not timed by its shape; give keep_params, "
            "max_bytes or max_ram"
        )
    if config.timed:
        shapes = _shapes(checkpoint, config, timing.target())
    left, out = [made(shape) for shape in shapes], list[Row]()
    steps = rounds_for(len(left))
    for number, (share, survivors) in enumerate(steps, start=1):
        if number == len(steps):
            left, slow = timing.time(left, made)
            out = slow + out
        left = rounds.score(left, number, len(steps), share)
        left, out = left[:survivors], left[survivors:] + out
    for row in left[:SHOWN]:
        say(f"search: {_told(row)}")
    say(f"search: {rounds.told()}")
    return [{key: value for key, value in row.items() if key != "plan"} for row in left + out]


def _halved(
    checkpoint: Checkpoint,
    shapes: list[Shape],
    profile: Profile,
    config: PruneConfig,
    data: DataConfig,
    options: Options,
    scratch: Path,
) -> list[Row]:
    """`_tried`, and then short distillations of the best few; goes on where it was stopped."""
    from regrow.search.halving import Distillations, halve

    asked = digest(
        config.model_dump(mode="json"),
        data_digest(data),
        checkpoint.fingerprint,
        digest(profile.info),
    )
    path = scratch / ROUNDS
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("asked") != asked:
        shutil.rmtree(scratch, ignore_errors=True)
        found = {"rows": _tried(checkpoint, shapes, profile, config, data, options)}
        scratch.mkdir(parents=True)
        write_json(path, {"asked": asked, **found})
    rows: list[Row] = found["rows"]
    last = [row for row in rows if row["round"] == rows[0]["round"]][: config.halving_shapes]
    score = Distillations(checkpoint, profile, config, data, options, scratch)
    return halve(last, config.halving_tokens, score, score.drop) + rows[len(last) :]


def _shapes(checkpoint: Checkpoint, config: PruneConfig, target: Target) -> list[Shape]:
    given = (families.of(checkpoint), checkpoint.config, target, config.multiple_of)
    if config.num_candidates <= HANDFUL:
        return candidates(*given)[: config.num_candidates]
    return grid(*given, config.num_candidates)


def _cut_by(shapes: list[Shape], family: Family, config: dict[str, Any]) -> set[str]:
    """The dimensions that any of the shapes cuts."""
    full = family.sizes(config)
    after = [full_sizes(family, full, shape.sizes) for shape in shapes]
    return {dim for dim in full if any(sizes[dim] != full[dim] for sizes in after)}


def _scored(profile: Profile, criterion: str) -> set[str]:
    """The dimensions that a profile has scores of by a criterion."""
    return {dim for dim in SORTED if criterion in profile.criteria([dim])}


def _named(config: PruneConfig) -> str:
    """The targets that are given, by name."""
    return ", ".join(name for name in TARGETS if getattr(config, name) is not None)


def _told(row: Row) -> str:
    times = ""
    if "prefill_ms" in row:
        times = f"prefill {row['prefill_ms']:.0f} ms  decode {row['decode_ms']:.1f} ms  "
    size = f"{row['keep']:6.1%} kept  {row['bytes'] / 1e6:,.1f} MB {row['format']}"
    return f"{size}  {times}KL {row['kl']:.3f} nats  {row['name']}"


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
    stage = Stage(out, "prune", config.with_sizes(chosen["sizes"]), inputs)
    return table if stage.complete else None
