"""Block influence of a layer (Men et al., 2024, ShortGPT, arXiv:2403.03853)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"layers"})
NEEDS = frozenset({"input_output_distance"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """1 − mean_tokens cos(layer input, layer output): the change of direction of the
    residual stream in the layer."""
    return stats["input_output_distance"].squeeze(-1)
