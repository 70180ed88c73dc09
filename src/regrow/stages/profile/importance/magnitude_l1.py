"""L1 norm of the weights, which needs no text (Li et al., 2017, arXiv:1608.08710)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import WIDTHS, Stats, Weights

DIMS = WIDTHS | {"experts"}
NEEDS: frozenset[str] = frozenset()


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Σ |w| over every weight of the unit, in all tensors that read or write it."""
    return torch.stack([weight.float().abs().sum(-1) for weight in weights.carrying()]).sum(0)
