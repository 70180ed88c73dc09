"""Successive halving: the last few shapes are distilled a little, the better half twice as long.

Jamieson and Talwalkar 2016, with the training length as the resource. A distillation is extended
from rung to rung, not begun again; a search that was stopped goes on at the rung that it was in.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regrow import stage_dir
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.data import DataConfig
from regrow.profile_folder import Profile
from regrow.pruning.config import PruneConfig
from regrow.pruning.prune import prune_to_sizes
from regrow.runtime.progress import say
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill

BATCH_TOKENS = 512
RUNGS = "rungs.json"
FIGURE = "held-out KL"

Row = dict[str, Any]
Score = Callable[[Row, int], float]
"""(row, tokens to train on in all) → KL to the dense model on held-out text."""


def rungs_for(count: int, tokens: int) -> list[tuple[int, int]]:
    """(shapes, tokens each was trained on in all) of every rung, until one shape is left."""
    rungs = []
    while count > 1:
        rungs.append((count, tokens))
        count, tokens = count // 2, 2 * tokens
    return rungs


def tokens_for(count: int, tokens: int) -> int:
    """Tokens that are trained on in all: a rung goes on where the one before ended."""
    total, before = 0, 0
    for shapes, length in rungs_for(count, tokens):
        total, before = total + shapes * (length - before), length
    return total


def halve(
    rows: list[Row], tokens: int, score: Score, drop: Callable[[Row], None] | None = None
) -> list[Row]:
    """The rows in order of merit: the winner, then by the rungs they reached and their last KL.

    Each row gets `distilled`: KL by tokens. A KL that is no number loses. `drop` is told who is
    out.
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
    """Scores shapes by short distillations, in folders of their own below `folder`."""

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
        """Held-out KL of a shape, cut, repaired as asked, and distilled on `tokens` in all."""
        known, key = self._known(), _key(row)
        if str(tokens) in known.get(key, {}):
            return float(known[key][str(tokens)])
        sizes = self.config.with_sizes(row["sizes"])
        cut = prune_to_sizes(self.checkpoint, self.folder / key, sizes, self.profile)
        trained = distill(
            cut,
            self.checkpoint,
            self.data,
            self.folder / f"{key}-distilled",
            self._config(tokens),
            self.options,
        )
        found = stage_dir.read(trained)
        assert found is not None
        value = next(float(f["value"]) for f in found["figures"] if f["name"] == FIGURE)
        known.setdefault(key, {})[str(tokens)] = value
        stage_dir.write_json(self.folder / RUNGS, known)
        return value

    def _config(self, tokens: int) -> DistillConfig:
        """A distillation that is measured where it begins and after every first rung's length."""
        length = self.data.sequence_length
        batch = math.ceil(BATCH_TOKENS / length) * length
        every = max(batch, self.config.halving_tokens)
        return DistillConfig(tokens=max(tokens, batch), batch_tokens=batch, eval_tokens=every)

    def _known(self) -> dict[str, dict[str, float]]:
        path = self.folder / RUNGS
        if not path.exists():
            return {}
        found: dict[str, dict[str, float]] = json.loads(path.read_text())
        return found

    def drop(self, row: Row) -> None:
        """Remove the folders of a shape that is out; its figures stay."""
        for name in (_key(row), f"{_key(row)}-distilled"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def _key(row: Row) -> str:
    return "-".join(f"{dim}{size}" for dim, size in sorted(row["sizes"].items()))


def _order(value: float) -> float:
    return value if math.isfinite(value) else math.inf
