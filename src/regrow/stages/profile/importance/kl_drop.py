"""Greedy removal of layers by the KL to the whole model, measured for every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"layers"})
NEEDS = frozenset({"kl_removal"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Place in the order of removal, 0 first: by KL(whole ‖ without it)."""
    return stats["kl_removal"].squeeze(-1)
