"""Ridge regression of a layer's weights, with a penalty on the change from the current weights.

For a layer with weights W, inputs x and target outputs t, each token weighted by w_t²,

    W' = argmin Σ_t w_t² |W' x_t − t|² + λ |W' − W|²
       = W + (T − W X)(X + λ I)^-1,        X = Σ w_t² x xᵀ,  T = Σ w_t² t xᵀ

so that the weights do not change for λ → ∞.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-2, 1e-1, 1.0)  # λ in units of the mean of X's diagonal


@dataclass(frozen=True)
class Solution:
    """A reader's new weights [out, kept], and its validation error relative to the output."""

    weight: Tensor
    ridge: float | None
    error_before: float
    error_after: float


@dataclass
class Moments:
    """X [in, in], T [out, in] and Σ w_t² |t|², summed over the added tokens."""

    xx: Tensor
    tx: Tensor
    tt: float = 0.0

    @classmethod
    def empty(cls, weight: Tensor) -> Moments:
        """Zero moments for a layer with this weight [out, in], in its dtype."""
        return cls(weight.new_zeros(weight.shape[1], weight.shape[1]), torch.zeros_like(weight))

    def add(self, x_Ni: Tensor, t_No: Tensor) -> None:
        """Add tokens that are already multiplied by their w_t."""
        self.xx.addmm_(x_Ni.T, x_Ni)
        self.tx.addmm_(t_No.T, x_Ni)
        self.tt += float(t_No.square().sum(dtype=torch.float64))

    def error(self, weight: Tensor) -> float:
        """Σ w_t² |W x − t|² = tr(W X Wᵀ) − 2 tr(W Tᵀ) + Σ w_t² |t|²."""
        wide = weight.to(self.xx.dtype)
        quadratic = ((wide @ self.xx) * wide).sum(dtype=torch.float64)
        return max(float(quadratic - 2 * (wide * self.tx).sum(dtype=torch.float64)) + self.tt, 0.0)


def changes(
    xx: Tensor, residual: Tensor, ridges: tuple[float, ...]
) -> Iterator[tuple[float, Tensor]]:
    """Each λ and the change of the weights for it, residual · (X + λ I)^-1, in float64.

    `xx` is X [in, in]; `residual` is T − W X, transposed [in, out]. `xx` may be overwritten.
    """
    system = xx.double()
    diagonal = system.diagonal().clone()
    scale = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    for ridge in ridges:
        system.diagonal().copy_(diagonal + ridge * scale)
        yield ridge, torch.cholesky_solve(residual, torch.linalg.cholesky(system)).T


def refit(weight: Tensor, fit: Moments, validate: Moments, ridges: tuple[float, ...]) -> Solution:
    """New weights for `weight` [out, in], with the λ of lowest validation error.

    If no λ lowers the error, the weights are not changed (ridge None). Errors are
    sqrt(Σ w²|y' − t|² / Σ w²|t|²) on the `validate` moments.
    """
    wide = weight.to(fit.xx.dtype)
    total = max(validate.tt, torch.finfo(torch.float64).tiny)
    before = validate.error(wide)
    best, chosen, after = wide, None, before
    residual = (fit.tx.double() - wide.double() @ fit.xx.double()).T
    for ridge, change in changes(fit.xx, residual, ridges):
        candidate = wide + change.to(wide.dtype)
        error = validate.error(candidate)
        if error < after:
            best, chosen, after = candidate, ridge, error
    return Solution(best, chosen, (before / total) ** 0.5, (after / total) ** 0.5)
