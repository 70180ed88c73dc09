"""Grids: the values that a quantized weight may take.

A grid has the values (q − z) · s, where q is an integer in [−2^(b−1), 2^(b−1) − 1] or a float8 e4m3
value. s and z have the precision in which they will be stored. Scales follow compressed-tensors:
s = max|w| ÷ (2^b − 1)/2, and s = (max − min) ÷ (2^b − 1) with a zero point.

Shapes: R rows, C columns, G groups of columns per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrow.quantization.formats import Scheme

E4M3 = torch.float8_e4m3fn
SHRINKS = tuple(1 - 0.025 * n for n in range(15))
"""Shares of the full range to try as the range of a scale."""


@dataclass(frozen=True)
class Grid:
    """The grid of one weight [R, C]."""

    scheme: Scheme
    scale_RG: Tensor
    """The scales, in the dtype in which they are stored."""
    zero_RG: Tensor | None = None
    """The zero points of an asymmetric scheme, in int8."""

    def columns(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of each of `count` columns, float32 [R, C]."""
        group_size = count // self.scale_RG.shape[1]
        scale_RC = self.scale_RG.float().repeat_interleave(group_size, 1)
        zero = self.zero_RG
        return scale_RC, None if zero is None else zero.float().repeat_interleave(group_size, 1)

    def nearest(self, weight_RC: Tensor) -> Tensor:
        """The weight rounded to the nearest values of the grid, float32 [R, C]."""
        weight_RC = weight_RC.float()
        return nearest(weight_RC, self.scheme, *self.columns(weight_RC.shape[1]))


def _nearest(grouped: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Round weights [R, G, columns of a group] to grids with scales and zero points [R, G]."""
    wide = None if zero is None else zero.float()[..., None]
    return nearest(grouped, scheme, scale.float()[..., None], wide)


def nearest(weight: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Round a weight to the nearest values of a grid, float32; scale and zero are broadcast."""
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
    """Fit a grid to a weight, with scales stored in `dtype`.

    A group whose weights already lie on a grid of the scheme keeps that grid. The grid of any other
    group covers the group's full range. With `importance_C`, it covers a range that is smaller by
    up to 35 % and that minimizes Σ_c importance_c (w_c − q_c)².
    """
    grouped = weight_RC.float().unflatten(1, (scheme.groups(weight_RC.shape[1]), -1))
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    scale, zero = _scales(low, high, scheme, dtype)
    if importance_C is not None:
        scale, zero = _least_squares(grouped, low, high, scheme, dtype, importance_C)
    if scheme.kind == "int":
        on_grid, own_scale, own_zero = _grid_under(grouped, low, high, scheme, dtype)
        scale = torch.where(on_grid, own_scale, scale)
        zero = None if zero is None else torch.where(on_grid, own_zero, zero)
    return Grid(scheme, scale, zero)


def _least_squares(
    grouped: Tensor,
    low: Tensor,
    high: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    importance_C: Tensor,
) -> tuple[Tensor, Tensor | None]:
    importance = importance_C.float().unflatten(0, grouped.shape[1:])
    best_scale, best_zero = _scales(low, high, scheme, dtype)
    best_error = torch.full_like(low, torch.inf)
    for share in SHRINKS:
        scale, zero = _scales(low * share, high * share, scheme, dtype)
        error = ((_nearest(grouped, scheme, scale, zero) - grouped).square() * importance).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _grid_under(
    grouped: Tensor, low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether a group's weights, with 0, lie on a grid of the scheme; that grid's scale and zero.

    The candidates for the step are the smallest distance between two weights, its half and its
    third, each refined by least squares. Weights may be off the grid by up to a twentieth of a
    step, because their own 16-bit rounding moves them.
    """
    bottom, top = _range(scheme)
    gaps = torch.cat([grouped, torch.zeros_like(grouped[..., :1])], -1).sort(-1).values.diff()
    min_gap = (high - low) / (2 * (top - bottom))  # half the step whose grid covers the range
    gap = gaps.where(gaps > min_gap[..., None], torch.inf).amin(-1)
    on_grid = torch.zeros_like(low, dtype=torch.bool)
    scales, zeros = torch.ones_like(low, dtype=dtype), torch.zeros_like(low)
    for part in (1, 2, 3):
        q = (grouped / (gap / part)[..., None]).round()
        step = ((grouped * q).sum(-1) / q.square().sum(-1)).to(dtype).float()
        deviation = (grouped - q * step[..., None]).abs().amax(-1)
        zero = (bottom - q.amin(-1).clamp_max(0)) * (not scheme.symmetric)
        in_range = (q.amin(-1) + zero >= bottom) & (q.amax(-1) + zero <= top)
        new = ~on_grid & in_range & (deviation <= 0.05 * step)
        scales = torch.where(new, step.to(dtype), scales)
        zeros = torch.where(new, zero, zeros)
        on_grid |= new
    return on_grid, scales, zeros.to(torch.int8)


def _scales(
    low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    bottom, top = _range(scheme)
    steps = top - bottom
    reach = high - low if not scheme.symmetric else 2 * torch.maximum(high, -low)
    # By a tensor: CUDA multiplies by the reciprocal of a number, and the last bit may differ.
    scale = (reach / torch.full_like(reach, steps)).to(dtype)
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
    """Rounds to the nearest value of the grid; the gradient passes through unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid) -> Tensor:
        return grid.nearest(weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def fake_quantize(weight_RC: Tensor, grid: Grid) -> Tensor:
    """The weight rounded to the grid, differentiable by a straight-through estimator.

    Bengio, Léonard, Courville, 2013, arXiv:1308.3432.
    """
    result: Tensor = _Straight.apply(weight_RC, grid)
    return result
