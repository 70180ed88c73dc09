"""Angular distance over consecutive layers (Gromov et al., 2024, arXiv:2403.17887, eq. 7).

Layers that are dropped together should be scored together: of all groups of n consecutive layers,
the one with the smallest angle between its input and its output is dropped. The paper measures the
distance at the last token of each sequence; here it is averaged over all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"layers"})
NEEDS = frozenset({"angular_distance"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Row n − 1 [L, L]: the smallest distance of n consecutive layers that include the layer.

    d(l, n) = mean_tokens arccos(cos(x^l, x^(l+n))) / π, where x^l is the input of layer l. The n
    layers with the lowest scores in row n − 1 are therefore those of the smallest distance.
    """
    distance_LL = stats["angular_distance"]  # [last, first]
    layers = len(distance_LL)
    scores = torch.full_like(distance_LL, torch.inf)
    for n in range(1, layers + 1):
        for first, distance in enumerate(distance_LL.diagonal(1 - n)):
            layer = slice(first, first + n)
            scores[n - 1, layer] = scores[n - 1, layer].clamp_max(distance)
    return scores
