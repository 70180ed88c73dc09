"""Optimal Brain Surgeon for whole units, by the Gram matrix (Hassibi and Stork, 1993; ZipLM).

Let G = Σ x xᵀ over a reader's inputs and W its weights. Removing the channels S and re-solving the
rest adds tr(W_S (G⁻¹_SS)⁻¹ W_Sᵀ) to the squared error of the output. Units are removed greedily, a
few of the cheapest at a time; then W and G⁻¹ are updated for the rest (Kurtic et al., 2023,
arXiv:2302.04089).
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import GRAMS, Stats, Weights

DIMS = GRAMS
NEEDS = frozenset({"gram"})
STEPS = 64  # rounds of removal, each of at least one unit
DAMPING = 1e-2  # relative to the mean of G's diagonal


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """Position of each unit in the removal order, 0 for the first."""
    readers = torch.cat([weight.double() for weight in weights.reading()], dim=-1)
    return removal_order(stats["gram"].double(), readers, STEPS)


def removal_order(gram_dd: Tensor, readers: Tensor, steps: int) -> Tensor:
    """Position in the removal order [units]; `readers` [units, width, out], d = units · width."""
    units, width, _ = readers.shape
    damping = DAMPING * gram_dd.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.linalg.inv(gram_dd + damping * torch.eye(len(gram_dd), dtype=gram_dd.dtype))
    left = readers.flatten(0, 1).clone()  # [d, out]
    here = torch.arange(units)
    place = torch.empty(units)
    gone = 0
    while len(here):
        cost = _cost(inverse, left, width)
        count = min(max(1, units // steps), len(here))
        chosen = cost.argsort(stable=True)[:count]
        place[here[chosen]] = torch.arange(gone, gone + count, dtype=place.dtype)
        gone += count
        inverse, left = _without(inverse, left, chosen, width)
        stays = torch.ones(len(here), dtype=torch.bool)
        stays[chosen] = False
        here = here[stays]
    return place


def _cost(inverse: Tensor, left: Tensor, width: int) -> Tensor:
    """tr(W_S (G⁻¹_SS)⁻¹ W_Sᵀ) for the channels S of each unit."""
    units = len(left) // width
    diagonal = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    weights = left.view(units, width, -1)
    return (torch.linalg.solve(diagonal, weights) * weights).sum((1, 2))


def _without(inverse: Tensor, left: Tensor, chosen: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """G⁻¹ and W of the remaining channels, re-solved without the channels of the `chosen` units."""
    gone = (chosen[:, None] * width + torch.arange(width)).flatten()
    stays = torch.ones(len(left), dtype=torch.bool)
    stays[gone] = False
    across = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stays])
    kept = inverse[stays][:, stays] - inverse[stays][:, gone] @ across
    return kept, left[stays] - across.T @ left[gone]
