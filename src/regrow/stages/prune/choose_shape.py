"""Choice of shape: cut every candidate in memory, score it untrained, keep the best.

A handful of shapes, or hundreds in rounds on more and more text, scored by KL to the dense model on
calibration text that was not profiled; then, if asked for, successive halving with short
distillations.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.cost import fallbacks
from regrow.data import DataConfig
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.families import Family
from regrow.profile_folder import Profile
from regrow.pruning.choose import choose, full_sizes
from regrow.pruning.config import PruneConfig
from regrow.pruning.sorted_model import SORTED, order_by
from regrow.runtime.progress import say
from regrow.search.latency import Timing
from regrow.search.score import CutScorer, Rounds, Row, rounds_for, row_of, sequences_for
from regrow.search.shapes import Shape, named, shapes_for, to_try
from regrow.stage_dir import digest, write_json

SHOWN = 10
ROUNDS = "rounds.json"


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
    sequences = sequences_for(to_try(config, shapes))
    trial = CutScorer(checkpoint, profile, data, options, sequences, order)
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
            f"{named(config)}: a mixture of experts is not timed by its shape; give keep_params, "
            "max_bytes or max_ram"
        )
    if config.timed:
        shapes = shapes_for(checkpoint, config, timing.target())
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
    from regrow.stages.prune.halving import Distillations, halve

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


def _cut_by(shapes: list[Shape], family: Family, config: dict[str, Any]) -> set[str]:
    """The dimensions that any of the shapes cuts."""
    full = family.sizes(config)
    after = [full_sizes(family, full, shape.sizes) for shape in shapes]
    return {dim for dim in full if any(sizes[dim] != full[dim] for sizes in after)}


def _scored(profile: Profile, criterion: str) -> set[str]:
    """The dimensions that a profile has scores of by a criterion."""
    return {dim for dim in SORTED if criterion in profile.criteria([dim])}


def _told(row: Row) -> str:
    times = ""
    if "prefill_ms" in row:
        times = f"prefill {row['prefill_ms']:.0f} ms  decode {row['decode_ms']:.1f} ms  "
    size = f"{row['keep']:6.1%} kept  {row['bytes'] / 1e6:,.1f} MB {row['format']}"
    return f"{size}  {times}KL {row['kl']:.3f} nats  {row['name']}"
