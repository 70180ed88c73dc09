"""Fisher pruning: the second-order effect on the loss (Theis et al., 2018, arXiv:1801.05787)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import WIDTHS, Stats, Weights

DIMS = WIDTHS | {"layers", "experts"}
NEEDS = frozenset({"taylor_square_sum"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """½ Σ_tokens (Σ_width x·g)², g = ∂(next-token loss)/∂x. Needs a backward pass.

    The Fisher information approximates the curvature of the loss along the unit. The paper sums
    x·g over all positions of an example before squaring; here every token is a separate example.
    For a layer, x is its update of the residual stream. For an expert, x is its contribution to the
    layer's output. The score of a KV head is the sum over its query heads.
    """
    return stats["taylor_square_sum"].sum(-1) / 2
