"""Fluctuation of activations (FLAP; An et al., 2023, arXiv:2312.11983, eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import READ, Stats, Weights

DIMS = READ
NEEDS = frozenset({"sum", "square_sum"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Σ_channels Var_tokens(x) · ‖w‖², where w are the weights that read the channel.

    A channel that hardly varies could be replaced by its mean, which a bias can represent. Families
    without biases also lose the mean, so this criterion underestimates the loss for them.
    """
    tokens = stats["tokens"]
    variance = stats["square_sum"] / tokens - (stats["sum"] / tokens).square()
    norms = sum(weight.float().square().sum(-1) for weight in weights.reading())
    return (variance.clamp_min(0) * norms).sum(-1)
