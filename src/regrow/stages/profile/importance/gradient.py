"""Norm of the loss's gradient with respect to a unit's activation (sensitivity of the loss)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import WIDTHS, Stats, Weights

DIMS = WIDTHS
NEEDS = frozenset({"gradient_square_sum"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """sqrt(Σ_tokens Σ_width g²), g = ∂(next-token loss)/∂x. Needs a backward pass."""
    return stats["gradient_square_sum"].sum(-1).sqrt()
