"""How often each token of the vocabulary occurs in the calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"vocab"})
NEEDS = frozenset({"token_count"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Occurrences of each token id, special tokens included."""
    return stats["token_count"].squeeze(-1)
