"""One-shot repair: re-solve the layers that read a pruned dimension, on Gram matrices.

A reader y = W x keeps the inputs k and loses the inputs p. The weights on k that serve best are

    W' = argmin Σ_t w_t |W' x_k − W x|² + λ |W' − W_k|²
       = W_k + W_p G_pk (G_kk + λ I)^-1,        G = Σ_t w_t x xᵀ

(_ridge.py). λ is chosen for each reader by its error on blocks that G was not gathered on. No text
is run, and no more than one matrix is in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.families import unit_rows
from regrow.profile_folder import Gram
from regrow.pruning.repair import RepairSetup, Solutions
from regrow.pruning.repair._ridge import RIDGES, Solution, changes

GRAMS = True
REPAIRED = ("mlp", "heads")
ROWS = 512


def repair(job: RepairSetup, ridges: tuple[float, ...] = RIDGES) -> OneShot:
    """New weights, solved when they are asked for."""
    return OneShot(job, ridges)


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
    lost = gram.fit[k[:, None], p].double() @ wide[:, p].double().T
    total = _energy(wide, gram.validate).clamp_min(torch.finfo(torch.float64).tiny)

    difference = torch.zeros_like(wide)
    difference[:, p] = -wide[:, p]
    before = float((_energy(difference, gram.validate) / total).sqrt())
    best, chosen, after = None, None, before
    for ridge, wanted in changes(gram.fit[k[:, None], k], lost, ridges):
        change = wanted.to(wide.dtype)
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


def work_bytes(sizes: dict[str, int], tokens: int) -> int:
    """None: the Gram matrices lie in the profile."""
    return 0


class OneShot:
    """Gives `cut` the re-solved weights of each reader; remembers what each solve brought."""

    def __init__(self, job: RepairSetup, ridges: tuple[float, ...]) -> None:
        self.job, self.ridges = job, ridges
        self.solutions: Solutions = {}
        self._dims = {
            template: dim
            for dim in REPAIRED
            if job.profile.has_gram(dim)
            for template in job.family.readers(dim)
        }

    def __call__(self, name: str, kept: Tensor) -> Tensor:
        """The tensor to write for the parent's tensor `name`, whose cut form is `kept`."""
        found = self.job.family.find(name)
        if found is None or found[0] not in self._dims or found[1] is None:
            return kept
        dim, layer = self._dims[found[0]], found[1]
        units = self.job.plan.kept(dim, layer)
        if units is None:
            return kept
        rows = unit_rows(dim, self.job.plan.before)
        channels = [unit * rows + row for unit in units for row in range(rows)]
        weight = self.job.checkpoint.tensor(name)
        if self.job.plan.hidden is not None:
            weight = weight[self.job.plan.hidden]
        solution = solve(weight, self.job.profile.gram(dim, layer), channels, self.ridges)
        self.solutions[name] = (solution.ridge, solution.error_before, solution.error_after)
        return solution.weight.to(kept.dtype)
