"""Random scores, as a baseline for the other criteria."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import WIDTHS, Stats, Weights

DIMS = WIDTHS | {"layers", "experts"}
NEEDS: frozenset[str] = frozenset()


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), the same for the same seed."""
    return torch.rand(int(stats["count"]), generator=generator)
