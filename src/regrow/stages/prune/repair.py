"""Closed-form repair: re-solve the layers that read a pruned dimension, on Gram matrices.

A reader y = W x keeps the inputs k and loses the inputs p. The weights on k that serve best are

    W' = argmin Σ_t w_t |W' x_k − W x|² + λ |W' − W_k|²
       = W_k + W_p G_pk (G_kk + λ I)^-1,        G = Σ_t w_t x xᵀ

(ridge regression, drawn towards the weights that were there, so that λ → ∞ is no repair). λ is
chosen for each reader by its error on blocks that G was not gathered on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.families import Family, unit_rows
from regrow.plan import Plan
from regrow.statistics import Gram, Profile

REPAIRED = ("mlp", "heads")
RIDGES = (1e-2, 1e-1, 1.0)  # λ in units of the mean of G_kk's diagonal
ROWS = 512


@dataclass(frozen=True)
class Solution:
    """A reader's new weights [out, kept] and its held-out error, as a share of the output."""

    weight: Tensor
    ridge: float | None
    error_before: float
    error_after: float


def solve(weight: Tensor, gram: Gram, kept: list[int], ridges: tuple[float, ...]) -> Solution:
    """Re-solve one reader `weight` [out, in] for its `kept` inputs, in float64.

    Errors are sqrt(Σ w|y' − y|² / Σ w|y|²) on the held-out Gram. Where no λ beats leaving the
    weights as they are, they are left (ridge None).
    """
    k = torch.tensor(kept)
    is_kept = torch.zeros(weight.shape[1], dtype=torch.bool)
    is_kept[k] = True
    p = (~is_kept).nonzero().squeeze(-1)
    # Float64 only for the system and what it gives; errors in the Gram's dtype can be compared.
    wide = weight.to(torch.promote_types(weight.dtype, gram.fit.dtype))
    system = gram.fit[k[:, None], k].double()
    diagonal = system.diagonal().clone()
    scale = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    target = gram.fit[k[:, None], p].double() @ wide[:, p].double().T
    total = _energy(wide, gram.validate).clamp_min(torch.finfo(torch.float64).tiny)

    difference = torch.zeros_like(wide)
    difference[:, p] = -wide[:, p]
    before = float((_energy(difference, gram.validate) / total).sqrt())
    best, chosen, after = None, None, before
    for ridge in ridges:
        system.diagonal().copy_(diagonal + ridge * scale)
        change = torch.cholesky_solve(target, torch.linalg.cholesky(system)).T.to(wide.dtype)
        difference[:, k] = change
        error = float((_energy(difference, gram.validate) / total).sqrt())
        if error < after:
            best, chosen, after = change, ridge, error
    solved = wide[:, k] if best is None else wide[:, k] + best
    return Solution(solved, chosen, before, after)


def _energy(weight: Tensor, gram: Tensor) -> Tensor:
    """Σ_t w_t |W x_t|² = tr(W G Wᵀ), a few rows of W at a time."""
    parts = (rows.to(gram.dtype) for rows in weight.split(ROWS))
    return torch.stack([((rows @ gram) * rows).sum(dtype=torch.float64) for rows in parts]).sum()


class Repair:
    """Gives `cut` the re-solved weights of each reader; remembers what each solve brought."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        profile: Profile,
        plan: Plan,
        ridges: tuple[float, ...] = RIDGES,
    ) -> None:
        self.checkpoint, self.family, self.profile = checkpoint, family, profile
        self.plan, self.ridges = plan, ridges
        self.solutions: dict[str, tuple[float | None, float, float]] = {}
        self._dims = {
            template: dim
            for dim in REPAIRED
            if profile.has_gram(dim)
            for template in family.readers(dim)
        }

    def __call__(self, name: str, kept: Tensor) -> Tensor:
        """The tensor to write for the parent's tensor `name`, whose cut form is `kept`."""
        found = self.family.find(name)
        if found is None or found[0] not in self._dims or found[1] is None:
            return kept
        dim, layer = self._dims[found[0]], found[1]
        units = self.plan.kept(dim, layer)
        if units is None:
            return kept
        rows = unit_rows(dim, self.plan.before)
        channels = [unit * rows + row for unit in units for row in range(rows)]
        weight = self.checkpoint.tensor(name)
        if self.plan.hidden is not None:
            weight = weight[self.plan.hidden]
        solution = solve(weight, self.profile.gram(dim, layer), channels, self.ridges)
        self.solutions[name] = (solution.ridge, solution.error_before, solution.error_after)
        return solution.weight.to(kept.dtype)
