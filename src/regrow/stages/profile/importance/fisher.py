"""Fisher pruning: the second-order effect on the loss (Theis et al., 2018, arXiv:1801.05787)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import WIDTHS, Stats, Weights

DIMS = WIDTHS | {"layers", "experts"}
NEEDS = frozenset({"taylor_square_sum"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """½ Σ_tokens (Σ_width x·g)², g = ∂(next-token loss)/∂x. Takes a backward pass.

    The Fisher information approximates the curvature of the loss along the unit. The paper adds x·g
    over all positions of an example before it squares; here every token is an example of its own.
    For a layer, x is its update of the residual stream, for an expert its share of the layer's
    output; a KV head has the sum of its query heads.
    """
    return stats["taylor_square_sum"].sum(-1) / 2
