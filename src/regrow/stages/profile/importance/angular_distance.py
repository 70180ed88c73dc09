"""Angular distance over a block of layers (Gromov et al., 2024, arXiv:2403.17887, eq. 7).

Layers that go together are best judged together: the block of n layers whose input and output
point the same way is dropped, n being how many go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"layers"})
NEEDS = frozenset({"angular_distance"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Row n − 1, for n layers gone: the least distance of a block of n that the layer is in [L, L].

    d(l, n) = mean_tokens arccos(cos(x^l, x^(l+n))) / π, x^l the input of layer l. The n layers with
    the lowest score of row n − 1 are therefore the block of the least distance.
    """
    distance_LL = stats["angular_distance"]  # [last, first]
    layers = len(distance_LL)
    scores = torch.full_like(distance_LL, torch.inf)
    for n in range(1, layers + 1):
        for first, distance in enumerate(distance_LL.diagonal(1 - n)):
            layer = slice(first, first + n)
            scores[n - 1, layer] = scores[n - 1, layer].clamp_max(distance)
    return scores
