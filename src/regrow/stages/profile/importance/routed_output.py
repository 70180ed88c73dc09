"""Mean norm of an expert's output over its tokens (Lasby et al., 2025, arXiv:2510.13999)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"experts"})
NEEDS = frozenset({"routed_norm_sum", "routed_tokens"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """mean_routed-tokens ‖w · y‖₂, where y is the expert's output and w the router's weight.

    An expert that changes few tokens by much has a high score; one without tokens has score 0.
    """
    return (stats["routed_norm_sum"] / stats["routed_tokens"].clamp_min(1)).squeeze(-1)
