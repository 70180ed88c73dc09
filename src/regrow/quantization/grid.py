"""Grids: which values a weight may take.  Shapes: R rows, C columns, G groups of columns per row.

A grid has the values (q − z) · s with q integer in [−2^(b−1), 2^(b−1) − 1], or q in float8 e4m3;
s and z as they will be stored. Scales follow compressed-tensors: s = max|w| ÷ (2^b − 1)/2, and
(max − min) ÷ (2^b − 1) with a zero point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrow.quantization.schemes import Scheme

E4M3 = torch.float8_e4m3fn
SHRINKS = tuple(1 - 0.025 * n for n in range(15))
"""Shares of the full range that are tried for a scale."""


@dataclass(frozen=True)
class Grid:
    """The grid of one weight [R, C]."""

    scheme: Scheme
    scale_RG: Tensor
    """In the dtype it is stored in."""
    zero_RG: Tensor | None = None
    """int8, of an asymmetric scheme."""

    def columns(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of each of `count` columns, float32 [R, C]."""
        each = count // self.scale_RG.shape[1]
        scale_RC = self.scale_RG.float().repeat_interleave(each, 1)
        zero = self.zero_RG
        return scale_RC, None if zero is None else zero.float().repeat_interleave(each, 1)

    def nearest(self, weight_RC: Tensor) -> Tensor:
        """The nearest values of the grid, float32 [R, C]."""
        weight_RC = weight_RC.float()
        return nearest(weight_RC, self.scheme, *self.columns(weight_RC.shape[1]))


def nearest(weight: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The nearest values of a grid, float32; scale and zero are broadcast to the weight."""
    q = weight / scale
    if scheme.kind == "float":
        limit = torch.finfo(E4M3).max
        return q.clamp_(-limit, limit).to(E4M3).float() * scale
    if zero is not None:
        q += zero
    q = q.clamp_(*_range(scheme)).round_()
    return (q if zero is None else q - zero) * scale


def fit(
    weight_RC: Tensor, scheme: Scheme, dtype: torch.dtype, importance_C: Tensor | None = None
) -> Grid:
    """The grid of a weight: over its full range, with scales stored in `dtype`.

    Given the importance of each column, each group's range is shrunk by up to a third, to where
    Σ_c importance_c (w_c − q_c)² is least.
    """
    grouped = weight_RC.float().unflatten(1, (scheme.groups(weight_RC.shape[1]), -1))
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    if importance_C is None:
        return Grid(scheme, *_scales(low, high, scheme, dtype))
    importance = importance_C.float().unflatten(0, grouped.shape[1:])
    best_error = torch.full_like(low, torch.inf)
    best_scale = best_zero = torch.empty(0)
    for share in SHRINKS:
        scale, zero = _scales(low * share, high * share, scheme, dtype)
        wide = scale.float()[..., None], None if zero is None else zero.float()[..., None]
        error = ((nearest(grouped, scheme, *wide) - grouped).square() * importance).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale) if len(best_scale) else scale
        if zero is not None:
            best_zero = torch.where(better, zero, best_zero) if len(best_zero) else zero
    return Grid(scheme, best_scale, None if scheme.symmetric else best_zero)


def _scales(
    low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    bottom, top = _range(scheme)
    steps = top - bottom
    reach = high - low if not scheme.symmetric else 2 * torch.maximum(high, -low)
    scale = (reach / steps).to(dtype)
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    if scheme.symmetric:
        return scale, None
    zero = (bottom - low / scale.float()).clamp(bottom, top).round()
    return scale, zero.to(torch.int8)


def _range(scheme: Scheme) -> tuple[float, float]:
    if scheme.kind == "float":
        return torch.finfo(E4M3).min, torch.finfo(E4M3).max
    return -(2.0 ** (scheme.bits - 1)), 2.0 ** (scheme.bits - 1) - 1


class _Straight(torch.autograd.Function):
    """Nearest value of the grid; the gradient passes as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
        return fit(weight, scheme, dtype).nearest(weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def fake_quantize(weight_RC: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The weight rounded to its grid, differentiable by a straight-through estimator.

    Bengio, Léonard, Courville, 2013, arXiv:1308.3432. Scales are as stored in `dtype`.
    """
    result: Tensor = _Straight.apply(weight_RC, scheme, dtype)
    return result
