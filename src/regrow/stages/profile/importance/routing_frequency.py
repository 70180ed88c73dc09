"""Frequency with which the router chooses an expert; activations are not used."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"experts"})
NEEDS = frozenset({"routed_tokens"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Share of the calibration tokens that are sent to the expert."""
    return stats["routed_tokens"].squeeze(-1) / stats["tokens"]
