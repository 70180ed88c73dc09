"""First-order Taylor expansion of the loss (Molchanov et al., 2017, arXiv:1611.06440, eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import WIDTHS, Stats, Weights

DIMS = WIDTHS | {"layers", "experts"}
NEEDS = frozenset({"taylor_abs_sum"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Σ_tokens |Σ_width x·g|, g = ∂(next-token loss)/∂x. Takes a backward pass.

    The change of the loss without the unit, to first order. The paper adds x·g over all positions
    of an example before it takes the absolute value, and normalizes by layer; here every token is
    an example of its own, and nothing is normalized. For a layer, x is its update of the residual
    stream, for an expert its share of the layer's output; a KV head has the sum of its query heads.
    """
    return stats["taylor_abs_sum"].sum(-1)
