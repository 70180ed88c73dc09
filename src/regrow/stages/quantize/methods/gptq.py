"""GPTQ: rounds column after column, and lets the later columns compensate for the error.

Frantar et al., 2022, arXiv:2210.17323, by `regrow.calibration.compensate`. Columns are rounded in
the order of falling H_ii, the diagonal of the inputs' second moment. The scale of each group is
fixed beforehand to minimize Σ_c H_cc (w_c − q_c)². A row for which plain rounding has the smaller
error (w − q) H (w − q)ᵀ is rounded plainly.

Shapes: R rows, C columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regrow.calibration import compensate as obs
from regrow.calibration.compensate import inverse_factor
from regrow.quantization.formats import Scheme
from regrow.quantization.grid import Grid, fit, nearest

NEEDS_GRAM = True


def quantize(
    weight_RC: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    gram_CC: Tensor | None = None,
    damping: float = 0.01,
    held_RC: Tensor | None = None,
) -> tuple[Tensor, Grid]:
    """The rounded weight, float32 [R, C], and its grid; never worse than rounding to nearest.

    Without `gram_CC` (experts, the head) the weight is rounded to nearest. Weights where `held_RC`
    is True are zero and stay zero.
    """
    weight_RC = weight_RC.float()
    plain = fit(weight_RC, scheme, dtype)
    rounded = plain.nearest(weight_RC)
    if gram_CC is None:
        return rounded, plain
    gram_CC = gram_CC.float()
    grid = fit(weight_RC, scheme, dtype, gram_CC.diagonal())
    solved = compensate(weight_RC, grid, gram_CC, damping, held_RC)
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


def compensate(
    weight_RC: Tensor,
    grid: Grid,
    gram_CC: Tensor,
    damping: float,
    held_RC: Tensor | None = None,
) -> Tensor:
    """The weight rounded column after column; the later columns compensate for each error."""
    order = gram_CC.diagonal().argsort(descending=True, stable=True)
    factor_CC = inverse_factor(gram_CC[order][:, order], damping)
    scale_RC, zero_RC = grid.columns(weight_RC.shape[1])
    scale_RC = scale_RC[:, order]
    zero_RC = None if zero_RC is None else zero_RC[:, order]
    held_RC = None if held_RC is None else held_RC[:, order]

    def round_column(i: int, w_RC: Tensor) -> Tensor:
        zero = None if zero_RC is None else zero_RC[:, i]
        q_R = nearest(w_RC[:, i], grid.scheme, scale_RC[:, i], zero)
        return q_R if held_RC is None else q_R.masked_fill(held_RC[:, i], 0)

    return obs.compensate(weight_RC[:, order], factor_CC, round_column)[:, order.argsort()]
