"""Greedy removal of layers by perplexity (SLEB; Song et al., 2024, arXiv:2402.09025)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"layers"})
NEEDS = frozenset({"cross_entropy_removal"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Position in the removal order (0 is removed first), by the perplexity without the layer."""
    return stats["cross_entropy_removal"].squeeze(-1)
