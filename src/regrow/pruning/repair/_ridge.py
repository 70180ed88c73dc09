"""Ridge regression of a layer's weights, with a penalty on the change from the current weights.

For a layer with weights W, inputs x and target outputs t, each token weighted by w_t²,

    W' = argmin Σ_t w_t² |W' x_t − t|² + λ |W' − W|²
       = W + (T − W X)(X + λ I)^-1,        X = Σ w_t² x xᵀ,  T = Σ w_t² t xᵀ

so that the weights do not change for λ → ∞. With fewer tokens than inputs the same is cheaper by
tokens: with A the rows w_t x_tᵀ and E the rows w_t (t − W x_t)ᵀ,

    W' = W + Eᵀ (A Aᵀ + λ I)^-1 A
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHOOSING_ROWS = 256
"""Rows of a weight by whose error λ is chosen, evenly spaced."""
RIDGES = (1e-2, 1e-1, 1.0)  # λ in units of the mean of X's diagonal


@dataclass(frozen=True)
class Solution:
    """A reader's new weights [out, kept], and its validation error relative to the output."""

    weight: Tensor
    ridge: float | None
    error_before: float
    error_after: float


class Observations:
    """Inputs and targets of a layer, of tokens that are already multiplied by their w_t.

    Tokens are kept as they are while they are at most as many as the layer's inputs. More of them
    are summed up in X [in, in] and T [out, in], which then take less memory.
    """

    def __init__(self, weight: Tensor) -> None:
        """No tokens yet, for a layer with this weight [out, in], in its dtype."""
        self.weight = weight
        self.tokens: list[tuple[Tensor, Tensor]] | None = []
        self.xx, self.tx = weight.new_zeros(0, 0), weight.new_zeros(0, 0)
        self.tt = 0.0

    def add(self, x_Ni: Tensor, t_No: Tensor) -> None:
        """Add tokens: their inputs and their targets."""
        self.tt += float(t_No.square().sum(dtype=torch.float64))
        if self.tokens is None:
            self._sum_up(x_Ni, t_No)
            return
        self.tokens.append((x_Ni, t_No))
        if sum(len(x) for x, _ in self.tokens) > self.weight.shape[1]:
            inputs = self.weight.shape[1]
            self.xx = self.weight.new_zeros(inputs, inputs)
            self.tx = torch.zeros_like(self.weight)
            for x, t in self.tokens:
                self._sum_up(x, t)
            self.tokens = None

    def _sum_up(self, x_Ni: Tensor, t_No: Tensor) -> None:
        self.xx.addmm_(x_Ni.T, x_Ni)
        self.tx.addmm_(t_No.T, x_Ni)

    def error(self, weight: Tensor) -> float:
        """Σ w_t² |W x − t|², from sums as tr(W X Wᵀ) − 2 tr(W Tᵀ) + Σ w_t² |t|²."""
        total = self.error_of_rows(weight, slice(None))
        return total if self.tokens is not None else max(total + self.tt, 0.0)

    def error_of_rows(self, weight: Tensor, rows: Tensor | slice) -> float:
        """The same for some of the rows, `weight`; from sums without the constant Σ w_t² |t|²."""
        if self.tokens is not None:
            errors = ((x @ weight.T - t[:, rows]).square() for x, t in self.tokens)
            return sum(float(error.sum(dtype=torch.float64)) for error in errors)
        quadratic = ((weight @ self.xx) * weight).sum(dtype=torch.float64)
        return float(quadratic - 2 * (weight * self.tx[rows]).sum(dtype=torch.float64))


def changes(
    xx: Tensor, residual: Tensor, ridges: tuple[float, ...]
) -> Iterator[tuple[float, Tensor]]:
    """Each λ and the change of the weights for it, residual · (X + λ I)^-1, in float64.

    `xx` is X [in, in]; `residual` is T − W X, transposed [in, out]. `xx` may be overwritten.
    """
    return _solutions(xx.double(), residual, ridges)


def refit(
    weight: Tensor, fit: Observations, validate: Observations, ridges: tuple[float, ...]
) -> Solution:
    """New weights for `weight` [out, in], with the λ of lowest validation error.

    If no λ lowers the error, the weights are not changed (ridge None). Errors are
    sqrt(Σ w²|y' − t|² / Σ w²|t|²) on `validate`. Systems are solved in float64; from sums, λ is
    chosen by some of the rows, which are solved in float32.
    """
    total = max(validate.tt, torch.finfo(torch.float64).tiny)
    before = validate.error(weight)
    best, chosen, after = weight, None, before
    for ridge, change in _changes_of(weight, fit, validate, ridges) if ridges else ():
        candidate = weight + change.to(weight.dtype)
        error = validate.error(candidate)
        if error < after:
            best, chosen, after = candidate, ridge, error
    return Solution(best, chosen, (before / total) ** 0.5, (after / total) ** 0.5)


def _changes_of(
    weight: Tensor, fit: Observations, validate: Observations, ridges: tuple[float, ...]
) -> Iterator[tuple[float, Tensor]]:
    """Some λ, of which one is the best, and the change of the weights for each."""
    if fit.tokens is not None:
        return _changes_by_tokens(weight, fit.tokens, ridges)
    residual = (fit.tx.double() - weight.double() @ fit.xx.double()).T
    if len(ridges) > 1:
        rows = torch.arange(0, len(weight), -(-len(weight) // CHOOSING_ROWS), device=weight.device)
        errors = {
            ridge: validate.error_of_rows(weight[rows] + change, rows)
            for ridge, change in _solutions(
                fit.xx.clone(), residual[:, rows].to(fit.xx.dtype), ridges
            )
        }
        ridges = (min(errors, key=errors.__getitem__),)
    return changes(fit.xx, residual, ridges)


def _changes_by_tokens(
    weight: Tensor, tokens: list[tuple[Tensor, Tensor]], ridges: tuple[float, ...]
) -> Iterator[tuple[float, Tensor]]:
    x_Ni = torch.cat([x for x, _ in tokens])
    e_No = torch.cat([t.double() - x.double() @ weight.double().T for x, t in tokens])
    gram_NN = x_Ni.double() @ x_Ni.double().T
    for ridge, change_oN in _solutions(gram_NN, e_No, ridges, weight.shape[1]):
        yield ridge, change_oN.to(x_Ni.dtype) @ x_Ni


def _solutions(
    system: Tensor, right: Tensor, ridges: tuple[float, ...], inputs: int | None = None
) -> Iterator[tuple[float, Tensor]]:
    """Each λ and ((S + λ I)^-1 · right)ᵀ; λ is in units of tr(S) / inputs. Overwrites `system`."""
    diagonal = system.diagonal().clone()
    scale = diagonal.sum() / (inputs or len(diagonal))
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    for ridge in ridges:
        system.diagonal().copy_(diagonal + ridge * scale)
        yield ridge, torch.cholesky_solve(right, torch.linalg.cholesky(system)).T
