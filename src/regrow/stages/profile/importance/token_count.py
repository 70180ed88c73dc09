"""Number of occurrences of each token of the vocabulary in the calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"vocab"})
NEEDS = frozenset({"token_count"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Number of occurrences of each token id, including special tokens."""
    return stats["token_count"].squeeze(-1)
