"""Choose a shape: cut every candidate in memory, score it without training, keep the best.

Shapes are scored by their KL divergence from the dense model on calibration text that was not
profiled: up to 8 shapes at once, or hundreds in rounds with more text in each round. Optionally the
best few are then distilled for a short time, the better half of them twice as long, and so on
(successive halving, Jamieson and Talwalkar 2016, with the training length as the resource). Each
rung continues the distillations of the previous rung, and an interrupted search continues at its
last rung.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow import families, stage_dir
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
from regrow.pruning.prune import prune_to_sizes
from regrow.pruning.sorted_model import SORTED, order_by
from regrow.runtime import distributed
from regrow.runtime.progress import say
from regrow.search.latency import Timing
from regrow.search.score import (
    CutScorer,
    Rounds,
    Row,
    finalists_for,
    rounds_for,
    row_of,
    scheme_of,
    sequences_for,
)
from regrow.search.shapes import Shape, named, shapes_for, to_try
from regrow.stage_dir import digest, write_json

if TYPE_CHECKING:
    from regrow.quantization.formats import Scheme
    from regrow.stages.distill.config import DistillConfig

SHOWN = 10
ROUNDS = "rounds.json"
BATCH_TOKENS = 512
RUNGS = "rungs.json"
FIGURE = "held-out KL"

Score = Callable[[Row, int], float]
"""(row, total training tokens) → KL to the dense model on held-out text."""


def choose_shape(
    checkpoint: Checkpoint,
    shapes: list[Shape],
    profile: Profile,
    config: PruneConfig,
    data: DataConfig | None,
    options: Options,
    scratch: Path,
) -> list[Row]:
    """Score the shapes; print and return the table, the best shape first.

    Rows have name, sizes, parameters, keep, bytes and ram in `format`, kl (in the shape's last
    round), round and chosen. Finalists also have prefill_ms and decode_ms; distilled shapes have
    `distilled`, the KL by training tokens.
    """
    family = families.of(checkpoint)
    if data is None or not to_try(config, shapes):
        rows = [{**row_of(s, family, checkpoint.config, config), "kl": 0.0} for s in shapes]
    else:
        given = (checkpoint, shapes, profile, config, data, options)
        rows = _halved(*given, scratch) if config.halving_tokens else _tried(*given)
    rows[0]["chosen"] = True
    say(f"search: chose {rows[0]['name']}")
    for line in fallbacks(family, checkpoint.config, rows[0]["format"], rows[0]["sizes"]):
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
    """The scored rows: those of the last round first, the best at the top, then earlier rounds.

    The processes of a job share the shapes; the first one alone measures time.
    """
    family, parent = families.of(checkpoint), checkpoint.config
    dims = _cut_by(shapes, family, parent) if shapes else _scored(profile, config.criterion)
    order = order_by(family, parent, profile, config.criterion, dims)
    sequences = sequences_for(to_try(config, shapes))
    scorer = CutScorer(checkpoint, profile, data, options, sequences, order)
    timing, rounds = Timing(scorer, config), Rounds(scorer, config)

    def row_with_plan(shape: Shape) -> Row:
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
        target = distributed.from_first(timing.target)
        shapes = shapes_for(checkpoint, config, target)
    left, out = [row_with_plan(shape) for shape in shapes], list[Row]()
    steps = rounds_for(len(left), finalists_for(config))
    whole = next(number for number, (share, _) in enumerate(steps, start=1) if share == 1.0)
    for number, (share, survivors) in enumerate(steps, start=1):
        if number == whole:  # before the repair, because timing may change the shapes
            timed = partial(timing.time, left, row_with_plan)
            left, slow = distributed.from_first(timed)
            out = slow + out
        left = rounds.score(left, number, len(steps), share, number > whole)
        left, out = left[:survivors], left[survivors:] + out
    for row in left[:SHOWN]:
        say(f"search: {_line(row)}")
    say(f"search: {rounds.summary()}")
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
    """`_tried`, then short distillations of the best few; continues an interrupted search."""
    asked = digest(
        config.model_dump(mode="json"),
        data_digest(data),
        checkpoint.fingerprint,
        digest(profile.info),
    )
    path = scratch / ROUNDS
    saved = distributed.from_first(lambda: json.loads(path.read_text()) if path.exists() else {})
    if saved.get("asked") != asked:
        saved = {"asked": asked, "rows": _tried(checkpoint, shapes, profile, config, data, options)}
        if distributed.is_main():
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            write_json(path, saved)
    rows: list[Row] = saved["rows"]
    last = [row for row in rows if row["round"] == rows[0]["round"]][: config.halving_shapes]
    score = Distillations(checkpoint, profile, config, data, options, scratch)
    best = distributed.on_first(partial(halve, last, config.halving_tokens, score, score.drop))
    return best + rows[len(last) :]


def _cut_by(shapes: list[Shape], family: Family, config: dict[str, Any]) -> set[str]:
    """The dimensions that at least one of the shapes cuts."""
    full = family.sizes(config)
    after = [full_sizes(family, full, shape.sizes) for shape in shapes]
    return {dim for dim in full if any(sizes[dim] != full[dim] for sizes in after)}


def _scored(profile: Profile, criterion: str) -> set[str]:
    """The dimensions for which a profile has scores by a criterion."""
    return {dim for dim in SORTED if criterion in profile.criteria([dim])}


def _line(row: Row) -> str:
    times = ""
    if "prefill_ms" in row:
        times = f"prefill {row['prefill_ms']:.0f} ms  decode {row['decode_ms']:.1f} ms  "
    size = f"{row['keep']:6.1%} kept  {row['bytes'] / 1e6:,.1f} MB {row['format']}"
    return f"{size}  {times}KL {row['kl']:.3f} nats  {row['name']}"


def rungs_for(count: int, tokens: int) -> list[tuple[int, int]]:
    """(number of shapes, total training tokens of each) for every rung, until one shape is left."""
    rungs = []
    while count > 1:
        rungs.append((count, tokens))
        count, tokens = count // 2, 2 * tokens
    return rungs


def tokens_for(count: int, tokens: int) -> int:
    """Training tokens of all rungs; each rung continues the distillations of the previous one."""
    total, before = 0, 0
    for shapes, length in rungs_for(count, tokens):
        total, before = total + shapes * (length - before), length
    return total


def halve(
    rows: list[Row], tokens: int, score: Score, drop: Callable[[Row], None] | None = None
) -> list[Row]:
    """The rows, the winner first, the others sorted by the last rung they reached and its KL.

    Each row gets `distilled`, the KL by training tokens. A NaN ranks last. `drop` is called for
    each row that is eliminated.
    """
    left, out = list(rows), list[Row]()
    for count, length in rungs_for(len(rows), tokens):
        for row in left:
            row["distilled"] = {**row.get("distilled", {}), str(length): score(row, length)}
            say(f"search: {length:,} tokens  KL {row['distilled'][str(length)]:.3f}  {row['name']}")
        left = sorted(left, key=lambda row: _order(row["distilled"][str(length)]))
        left, lost = left[: count // 2], left[count // 2 :]
        out = lost + out
        if drop is not None:
            for row in lost:
                drop(row)
    return left + out


class Distillations:
    """Scores shapes by short distillations; each shape has its own folder below `folder`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        profile: Profile,
        config: PruneConfig,
        data: DataConfig,
        options: Options,
        folder: Path,
    ) -> None:
        self.checkpoint, self.profile, self.config = checkpoint, profile, config
        self.data, self.options, self.folder = data, options, folder

    def __call__(self, row: Row, tokens: int) -> float:
        """Validation KL of a shape that is cut, repaired, and distilled on `tokens` in total."""
        from regrow.stages.distill.stage import distill

        known, key = self._known(), _key(row)
        if str(tokens) in known.get(key, {}):
            return float(known[key][str(tokens)])
        cut = self.checkpoint.folder
        if row["sizes"]:
            sizes = self.config.with_sizes(row["sizes"], row["format"])
            cut = prune_to_sizes(self.checkpoint, self.folder / key, sizes, self.profile)
        trained = distill(
            cut,
            self.checkpoint,
            self.data,
            self.folder / f"{key}-distilled",
            self._config(tokens, scheme_of(row, self.config)),
            self.options,
        )
        manifest = stage_dir.read(trained)
        assert manifest is not None
        figures = {figure["name"]: figure["value"] for figure in manifest["figures"]}
        value = float(figures[FIGURE])
        known.setdefault(key, {})[str(tokens)] = value
        write_json(self.folder / RUNGS, known)
        return value

    def _config(self, tokens: int, scheme: Scheme | None) -> DistillConfig:
        """A distillation, evaluated at its start and then once per first rung's length.

        With a scheme, it trains for the grids of that scheme.
        """
        from regrow.stages.distill.config import DistillConfig

        length = self.data.sequence_length
        batch = math.ceil(BATCH_TOKENS / length) * length
        every = max(batch, self.config.halving_tokens)
        return DistillConfig(
            tokens=max(tokens, batch),
            batch_tokens=batch,
            eval_tokens=every,
            fake_quantize=None if scheme is None else scheme.name,
        )

    def _known(self) -> dict[str, dict[str, float]]:
        path = self.folder / RUNGS
        if not path.exists():
            return {}
        known: dict[str, dict[str, float]] = json.loads(path.read_text())
        return known

    def drop(self, row: Row) -> None:
        """Remove the folders of an eliminated shape; its results are kept."""
        for name in (_key(row), f"{_key(row)}-distilled"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def remove_models(scratch: Path) -> None:
    """Remove the models of a search; its scores stay, so that the same search is fast again."""
    for path in scratch.glob("*/"):
        shutil.rmtree(path, ignore_errors=True)


def _key(row: Row) -> str:
    sizes = [f"{dim}{size}" for dim, size in sorted(row["sizes"].items())]
    return "-".join([*sizes, row["format"]])


def _order(value: float) -> float:
    return value if math.isfinite(value) else math.inf
