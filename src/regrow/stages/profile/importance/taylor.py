"""First-order Taylor expansion of the loss (Molchanov et al., 2017, arXiv:1611.06440, eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import WIDTHS, Stats, Weights

DIMS = WIDTHS | {"layers", "experts"}
NEEDS = frozenset({"taylor_abs_sum"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Σ_tokens |Σ_width x·g|, g = ∂(next-token loss)/∂x. Takes a backward pass.

    The change of the loss when the unit goes, to first order. For a layer, x is what it adds to the
    residual stream, for an expert what it adds to the layer's output; a KV head counts the sum of
    its query heads.
    """
    return stats["taylor_abs_sum"].sum(-1)
