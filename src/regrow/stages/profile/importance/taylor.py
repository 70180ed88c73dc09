"""First-order Taylor expansion of the loss (Molchanov et al., 2017, arXiv:1611.06440, eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import WIDTHS, Stats, Weights

DIMS = WIDTHS | {"layers", "experts"}
NEEDS = frozenset({"taylor_abs_sum"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Σ_tokens |Σ_width x·g|, g = ∂(next-token loss)/∂x. Needs a backward pass.

    This is the first-order change of the loss when the unit is removed. The paper sums x·g over all
    positions of an example before it takes the absolute value, and normalizes by layer. Here every
    token is a separate example, and nothing is normalized. For a layer, x is its update of the
    residual stream. For an expert, x is its contribution to the layer's output. The score of a KV
    head is the sum over its query heads.
    """
    return stats["taylor_abs_sum"].sum(-1)
