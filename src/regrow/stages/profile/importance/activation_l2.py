"""L2 norm of a unit's activation over all calibration tokens: keeps rare large activations."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import WIDTHS, Stats, Weights

DIMS = WIDTHS | {"experts"}
NEEDS = frozenset({"square_sum"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """sqrt(Σ_tokens Σ_width x²), x at the input of the layer that reads the dimension.

    For experts, x is what one adds to the layer's output.
    """
    return stats["square_sum"].sum(-1).sqrt()
