"""L2 norm of a unit's activation over all calibration tokens; rare large values count strongly."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import WIDTHS, Stats, Weights

DIMS = WIDTHS | {"experts"}
NEEDS = frozenset({"square_sum"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """sqrt(Σ_tokens Σ_width x²), where x is the input of the projection that reads the dimension.

    For an expert, x is its contribution to the layer's output.
    """
    return stats["square_sum"].sum(-1).sqrt()
