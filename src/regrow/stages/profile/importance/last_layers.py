"""Drop the deepest layers first: the simplest rule for depth pruning, which needs no text.

Gromov et al. (2024, arXiv:2403.17887, §4.4) find that it is close to their best method after
training, if the very last layer is kept. Here the last layer is dropped too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"layers"})
NEEDS: frozenset[str] = frozenset()


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Number of layers after the layer: L − 1 − l for layer l of L."""
    return torch.arange(int(stats["count"]), dtype=torch.float32).flip(0)
