"""GPTQ: rounds column after column, and lets the later columns compensate for the error.

Frantar et al., 2022, arXiv:2210.17323. H is the damped second moment of the layer's inputs, and U
is the upper Cholesky factor of H⁻¹. Rounding column i leaves the error e = (w_i − q_i) / U_ii, and
w_j −= e U_ij for all later columns j. Columns are rounded in the order of falling H_ii. The scale
of each group is fixed beforehand to minimize Σ_c H_cc (w_c − q_c)². A row for which plain rounding
has the smaller error (w − q) H (w − q)ᵀ is rounded plainly.

Shapes: R rows, C columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regrow.quantization.formats import Scheme
from regrow.quantization.grid import Grid, fit, nearest

NEEDS_GRAM = True
BLOCK = 128
"""Number of columns to round before all later columns are updated at once."""


def quantize(
    weight_RC: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    gram_CC: Tensor | None = None,
    damping: float = 0.01,
) -> tuple[Tensor, Grid]:
    """The rounded weight, float32 [R, C], and its grid; never worse than rounding to nearest.

    Without `gram_CC` (experts, the head) the weight is rounded to nearest.
    """
    weight_RC = weight_RC.float()
    plain = fit(weight_RC, scheme, dtype)
    rounded = plain.nearest(weight_RC)
    if gram_CC is None:
        return rounded, plain
    gram_CC = gram_CC.float()
    grid = fit(weight_RC, scheme, dtype, gram_CC.diagonal())
    solved = compensate(weight_RC, grid, gram_CC, damping)
    solved_error, plain_error = (error(weight_RC, q, gram_CC) for q in (solved, rounded))
    worse_R1 = (solved_error >= plain_error)[:, None]
    scale = torch.where(worse_R1, plain.scale_RG, grid.scale_RG)
    zero = grid.zero_RG
    if zero is not None and plain.zero_RG is not None:
        zero = torch.where(worse_R1, plain.zero_RG, zero)
    mixed = replace(grid, scale_RG=scale, zero_RG=zero)
    return torch.where(worse_R1, rounded, solved), mixed


def error(weight_RC: Tensor, rounded_RC: Tensor, gram_CC: Tensor) -> Tensor:
    """Squared error of each row's output, (w − q) H (w − q)ᵀ [R]."""
    off_RC = weight_RC - rounded_RC
    return ((off_RC @ gram_CC) * off_RC).sum(1)


def compensate(weight_RC: Tensor, grid: Grid, gram_CC: Tensor, damping: float) -> Tensor:
    """The weight rounded column after column; the later columns compensate for each error."""
    order = gram_CC.diagonal().argsort(descending=True, stable=True)
    factor_CC = _factor(gram_CC[order][:, order], damping)
    w_RC = weight_RC[:, order].clone()
    scale_RC, zero_RC = grid.columns(w_RC.shape[1])
    scale_RC = scale_RC[:, order]
    zero_RC = None if zero_RC is None else zero_RC[:, order]
    errors_RC = torch.zeros_like(w_RC)
    for begin in range(0, w_RC.shape[1], BLOCK):
        end = min(begin + BLOCK, w_RC.shape[1])
        for i in range(begin, end):
            zero = None if zero_RC is None else zero_RC[:, i]
            q_R = nearest(w_RC[:, i], grid.scheme, scale_RC[:, i], zero)
            errors_RC[:, i] = (w_RC[:, i] - q_R) / factor_CC[i, i]
            w_RC[:, i + 1 : end] -= errors_RC[:, i, None] * factor_CC[i, i + 1 : end]
            w_RC[:, i] = q_R
        w_RC[:, end:] -= errors_RC[:, begin:end] @ factor_CC[begin:end, end:]
    return w_RC[:, order.argsort()]


def _factor(gram_CC: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped matrix; damping increases on failure."""
    eye = torch.eye(len(gram_CC), dtype=gram_CC.dtype, device=gram_CC.device)
    ridge = gram_CC.diagonal().mean().clamp_min(torch.finfo(gram_CC.dtype).tiny)
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(gram_CC + damping * ridge * eye)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 10
    raise AssertionError("a damped second moment is positive definite")
