"""Wanda for whole units: activation times weight (Sun et al., 2023, arXiv:2306.11695)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import READ, Stats, Weights

DIMS = READ
NEEDS = frozenset({"square_sum"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """sqrt(Σ_channels Σ_tokens x² · ‖w‖²), where w are the weights that read the channel.

    For uncorrelated channels, this is the norm of the change in the reader's output when the unit
    is removed.
    """
    norms = sum(weight.float().square().sum(-1) for weight in weights.reading())
    return (stats["square_sum"] * norms).sum(-1).sqrt()
