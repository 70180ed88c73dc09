"""Finds models that came nearer to the teacher and yet lost tasks, which KL alone would hide."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean, stdev

from regrow.stage_dir import Figure
from regrow.stages.evaluate.eval_model import MetricResult

STANDARD_ERRORS = 2.0
"""A score fell when its mean paired difference is below 0 by more than so many standard errors."""
SCORES = ("acc", "exact_match", "exact_answers")
"""How the names of scores of tasks begin for which more is better."""


def contradictions(results: dict[str, MetricResult], teacher: str | None) -> list[str]:
    """A sentence for each model that is nearer to the teacher than the one before it, but worse.

    Models are compared with the one listed before them. Nearer: the KL is lower on every text that
    both were measured on. Worse: the mean over a task's rows of (score after − score before) is
    below −2 standard errors of that mean.
    """
    labels = [label for label in results if label != teacher]
    found = []
    for before, after in pairwise(labels):
        first, second = results[before], results[after]
        if not _nearer(first.figures, second.figures):
            continue
        for name in [name for name in second.items if name.startswith(SCORES)]:
            errors = standard_errors(first.items.get(name, []), second.items[name])
            if errors < -STANDARD_ERRORS:
                scores = f"{fmean(first.items[name]):.4f} to {fmean(second.items[name]):.4f}"
                found.append(
                    f"{after} is nearer to the teacher than {before} on every text, but its "
                    f"{name} fell from {scores} ({-errors:.1f} standard errors): do not judge it "
                    "by the KL alone; a share of cross_entropy in the losses, or text like the "
                    "task's, may help"
                )
    return found


def standard_errors(before: list[float], after: list[float]) -> float:
    """Mean of the paired differences ÷ its standard error; 0 where rows do not match.

    The standard error is the sample standard deviation of the differences ÷ √n.
    """
    if len(before) != len(after) or len(after) < 2:
        return 0.0
    differences = [new - old for old, new in zip(before, after, strict=True)]
    spread = stdev(differences)
    if spread == 0:
        return 0.0 if fmean(differences) == 0 else math.copysign(math.inf, fmean(differences))
    return fmean(differences) / (spread / math.sqrt(len(differences)))


def _nearer(before: list[Figure], after: list[Figure]) -> bool:
    """Whether the KL is lower on all texts that both models were measured on, of which one is."""
    old = {figure.name: figure.value for figure in before if figure.name.startswith("kl/")}
    new = {figure.name: figure.value for figure in after if figure.name in old}
    return bool(new) and all(value < old[name] for name, value in new.items())
