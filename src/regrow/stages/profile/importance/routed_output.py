"""Mean norm of an expert's output over its tokens (Lasby et al., 2025, arXiv:2510.13999)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"experts"})
NEEDS = frozenset({"routed_norm_sum", "routed_tokens"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Σ_routed tokens ‖w · y‖₂ ÷ their number; y the expert's output, w the router's weight.

    An expert with few tokens that it changes much scores high; one without tokens scores zero.
    """
    return (stats["routed_norm_sum"] / stats["routed_tokens"].clamp_min(1)).squeeze(-1)
