"""Untrained rounds of a search: every shape on a little text, the best on more, the last on all."""

from __future__ import annotations

import math
from typing import Any

import torch

from regrow.families import Family
from regrow.footprint import file_bytes, ram_bytes
from regrow.progress import progress, say
from regrow.stages.prune.config import PruneConfig
from regrow.stages.prune.shapes import Shape
from regrow.trial import TRIAL_BLOCKS, Trial

HANDFUL = 8  # shapes that are tried in one round
MANY_BLOCKS = 8 * TRIAL_BLOCKS  # of text, for more than a handful
SECOND = 40  # shapes in the second round at most

Row = dict[str, Any]


def rounds_for(count: int) -> list[tuple[float, int]]:
    """(share of the text, survivors) of each round; a handful is scored on all of it at once.

    Of 200 shapes all are read 1/32 of the text, 40 of them 1/8 and 8 all of it: 19.25 evaluations
    of a shape, of which none costs more than one of the dense model.
    """
    if count <= HANDFUL:
        return [(1.0, count)]
    second = max(HANDFUL, min(SECOND, count // 5))
    first = 1 / 32 if count <= 200 else 1 / 64
    return [(first, second), (1 / 8, HANDFUL), (1.0, HANDFUL)]


def blocks_for(count: int) -> int:
    """Blocks of text to score `count` shapes on."""
    return TRIAL_BLOCKS if count <= HANDFUL else MANY_BLOCKS


def passes_for(count: int) -> float:
    """How often the text is read in all, in evaluations of one shape on all of it."""
    if count <= 1:
        return 0.0
    entered, passes = count, 1.0  # the dense model itself
    for share, survivors in rounds_for(count):
        entered, passes = survivors, passes + share * entered
    return passes


def row_of(shape: Shape, family: Family, config: dict[str, Any], prune: PruneConfig) -> Row:
    """What is known of a shape before it was tried; `kl` is None until then."""
    return {
        "name": shape.name,
        "sizes": shape.sizes,
        "parameters": shape.parameters,
        "keep": shape.parameters / family.count(config),
        "format": prune.format,
        "bytes": file_bytes(family, config, prune.format, shape.sizes),
        "ram": ram_bytes(family, config, prune.format, prune.context_length, shape.sizes),
        "kl": None,
        "round": 0,
        "chosen": False,
    }


class Rounds:
    """Scores rows by their plans, and keeps count of what it costs."""

    def __init__(self, trial: Trial, config: PruneConfig) -> None:
        self.trial, self.config = trial, config
        self.cost = 1.0  # the dense model has read the text once
        self.seconds = trial.dense_seconds

    def score(self, rows: list[Row], number: int, of: int, share: float) -> list[Row]:
        """The rows with their KL on a share of the text, the best first; repaired in the last."""
        before = [row["kl"] for row in rows]
        how = self.config if number == of else None
        with progress(f"search, round {number} of {of}", len(rows), "shapes") as counter:
            for row in rows:
                row |= {"kl": self.trial.kl(row["plan"], how, share), "round": number}
                self.cost += self.trial.share(share) * row["keep"]
                counter.advance(1, f"KL {row['kl']:.3f}")
        self.seconds += counter.seconds()
        if number > 1:
            agreement = rank_correlation(before, [row["kl"] for row in rows])
            say(f"search: rank correlation of rounds {number - 1} and {number}: {agreement:.2f}")
        return sorted(rows, key=cost_of)

    def told(self) -> str:
        """The cost in words."""
        clock = self.seconds / self.trial.dense_seconds
        return (
            f"cost {self.cost:.1f} dense evaluations of {self.trial.tokens:,} tokens (by the "
            f"clock, with cutting and repair, {clock:.1f})"
        )


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's: the correlation of the ranks. 1 for fewer than two."""
    if len(one) < 2:
        return 1.0
    ranks = torch.tensor([one, other]).double().argsort(dim=1).argsort(dim=1)
    return float(torch.corrcoef(ranks.double())[0, 1])


def cost_of(row: Row) -> float:
    """What rows are sorted by: the KL, with what is no number at the end."""
    return float(row["kl"]) if math.isfinite(row["kl"]) else math.inf
