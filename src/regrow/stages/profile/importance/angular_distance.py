"""Angular distance over consecutive layers (Gromov et al., 2024, arXiv:2403.17887, eq. 7).

Layers that are dropped together are best scored together: of all runs of n consecutive layers, the
one whose input and output point most nearly the same way is dropped. The paper measures the
distance at the last token of each sequence; here it is the mean over all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import Stats, Weights

DIMS = frozenset({"layers"})
NEEDS = frozenset({"angular_distance"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Row n − 1, for n dropped layers: the least distance of a run of n that has the layer [L, L].

    d(l, n) = mean_tokens arccos(cos(x^l, x^(l+n))) / π, x^l the input of layer l. The n layers with
    the lowest score of row n − 1 are therefore the run of the least distance.
    """
    distance_LL = stats["angular_distance"]  # [last, first]
    layers = len(distance_LL)
    scores = torch.full_like(distance_LL, torch.inf)
    for n in range(1, layers + 1):
        for first, distance in enumerate(distance_LL.diagonal(1 - n)):
            layer = slice(first, first + n)
            scores[n - 1, layer] = scores[n - 1, layer].clamp_max(distance)
    return scores
