"""Greedy removal of layers by the KL divergence from the whole model."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"layers"})
NEEDS = frozenset({"kl_removal"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Position in the removal order (0 is removed first), by KL(whole ‖ without the layer)."""
    return stats["kl_removal"].squeeze(-1)
