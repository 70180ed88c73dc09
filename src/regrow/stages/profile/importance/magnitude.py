"""Weight magnitude, which needs no text (Han et al., 2015; Li et al., 2017, for whole filters)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import WIDTHS, Stats, Weights

DIMS = WIDTHS | {"experts"}
NEEDS: frozenset[str] = frozenset()


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """sqrt(Σ w²) over every weight of the unit, in all tensors that read or write it."""
    total: Tensor | None = None
    for weight in weights.carrying():
        squares = weight.float().square().sum(-1)
        total = squares if total is None else total + squares
    assert total is not None, f"no tensor carries {dim}"
    return total.sqrt()
