"""One-shot repair: re-solve the projections that read a pruned dimension, from Gram matrices.

A projection y = W x (a reader) keeps the inputs k and loses the inputs p. The best weights on k are

    W' = argmin Σ_t w_t |W' x_k − W x|² + λ |W' − W_k|²
       = W_k + W_p G_pk (G_kk + λ I)^-1,        G = Σ_t w_t x xᵀ

(_ridge.py). λ is chosen for each reader by its error on the validation sequences. No text runs
through the model, and at most one Gram matrix is in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.families import unit_rows
from regrow.layerwise import Spill
from regrow.profile_folder import Gram
from regrow.pruning.repair import RepairSetup, Solutions
from regrow.pruning.repair._ridge import RIDGES, Solution, changes

GRAMS = True
REPAIRED = ("mlp", "heads")
ROWS = 512


def repair(setup: RepairSetup, ridges: tuple[float, ...] = RIDGES) -> OneShot:
    """The new weights; each is solved on its first use and stored in `setup.work`."""
    return OneShot(setup, ridges)


def solve(weight: Tensor, gram: Gram, kept: list[int], ridges: tuple[float, ...]) -> Solution:
    """Re-solve one reader `weight` [out, in] for its `kept` inputs, in float64.

    Errors are sqrt(Σ w|y' − y|² / Σ w|y|²) on the validation Gram matrix. If no λ lowers the
    error, the weights are not changed (ridge None).
    """
    k = torch.tensor(kept)
    is_kept = torch.zeros(weight.shape[1], dtype=torch.bool)
    is_kept[k] = True
    p = (~is_kept).nonzero().squeeze(-1)
    # Only the system is solved in float64: the Gram's dtype is exact enough for the errors.
    wide = weight.to(torch.promote_types(weight.dtype, gram.fit.dtype))
    lost = gram.fit[k[:, None], p].double() @ wide[:, p].double().T
    total = _energy(wide, gram.validate).clamp_min(torch.finfo(torch.float64).tiny)

    difference = torch.zeros_like(wide)
    difference[:, p] = -wide[:, p]
    before = float((_energy(difference, gram.validate) / total).sqrt())
    best, chosen, after = None, None, before
    for ridge, exact_change in changes(gram.fit[k[:, None], k], lost, ridges):
        change = exact_change.to(wide.dtype)
        difference[:, k] = change
        error = float((_energy(difference, gram.validate) / total).sqrt())
        if error < after:
            best, chosen, after = change, ridge, error
    solved = wide[:, k] if best is None else wide[:, k] + best
    return Solution(solved, chosen, before, after)


def _energy(weight: Tensor, gram: Tensor) -> Tensor:
    """Σ_t w_t |W x_t|² = tr(W G Wᵀ), computed a few rows of W at a time."""
    parts = (rows.to(gram.dtype) for rows in weight.split(ROWS))
    return torch.stack([((rows @ gram) * rows).sum(dtype=torch.float64) for rows in parts]).sum()


def work_bytes(sizes: dict[str, int], tokens: int) -> int:
    """Bytes of the solved projections, at four bytes per value."""
    reads = sizes["heads"] * sizes["head_dim"] + sizes.get("mlp", 0)
    return 4 * sizes["layers"] * sizes["hidden"] * reads


class OneShot:
    """Provides `cut` with the re-solved weights of each reader, and records their errors."""

    def __init__(self, setup: RepairSetup, ridges: tuple[float, ...]) -> None:
        self.setup, self.ridges = setup, ridges
        self.solutions: Solutions = {}
        self._weights = Spill(setup.work / "weights")
        self._dims = {
            template: dim
            for dim in REPAIRED
            if setup.profile.has_gram(dim)
            for template in setup.family.readers(dim)
        }

    def __call__(self, name: str, kept: Tensor) -> Tensor:
        """The tensor to write for the dense model's tensor `name`; `kept` is its kept part."""
        place = self.setup.family.find(name)
        if place is None or place.template not in self._dims or place.layer is None:
            return kept
        dim, plan = self._dims[place.template], self.setup.plan
        units = plan.kept(dim, place.layer)
        if units is None:
            return kept
        if name not in self.solutions:
            rows = unit_rows(dim, plan.before)
            channels = [unit * rows + row for unit in units for row in range(rows)]
            weight = self.setup.checkpoint.tensor(name)
            if plan.hidden is not None:
                weight = weight[plan.hidden]
            gram = self.setup.profile.gram(dim, place.layer)
            solution = solve(weight, gram, channels, self.ridges)
            self._weights.put(name, solution.weight)
            self.solutions[name] = (solution.ridge, solution.error_before, solution.error_after)
        return self._weights.get(name).to(kept.dtype)
