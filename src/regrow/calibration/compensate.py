"""Changes a weight column after column, and lets the later columns compensate for each error.

This is the optimal brain surgeon in a fixed order of columns (Frantar et al., 2022,
arXiv:2208.11580), which GPTQ and SparseGPT share. H is the damped second moment of the layer's
inputs, and U is the upper Cholesky factor of H⁻¹. If column i changes from w_i to q_i, its error is
e = (w_i − q_i) / U_ii, and w_j −= e U_ij for all later columns j. U_ii² is the first entry of the
inverse of H over the columns from i on.

Shapes: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128
"""Number of columns to change before all later columns are updated at once."""


def compensate(
    weight_RC: Tensor, factor_CC: Tensor, change: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The changed weight [R, C]; `factor_CC` is the `inverse_factor` of the second moment.

    `change(i, w_RC)` returns column i [R] as it shall be. In `w_RC`, the columns before i are
    changed already, and those from i to the end of i's block have compensated for all of them.
    """
    w_RC = weight_RC.clone()
    errors_RC = torch.zeros_like(w_RC)
    for begin in range(0, w_RC.shape[1], BLOCK):
        end = min(begin + BLOCK, w_RC.shape[1])
        for i in range(begin, end):
            q_R = change(i, w_RC)
            errors_RC[:, i] = (w_RC[:, i] - q_R) / factor_CC[i, i]
            w_RC[:, i + 1 : end] -= errors_RC[:, i, None] * factor_CC[i, i + 1 : end]
            w_RC[:, i] = q_R
        w_RC[:, end:] -= errors_RC[:, begin:end] @ factor_CC[begin:end, end:]
    return w_RC


def inverse_factor(gram_CC: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor [C, C] of the inverse of the damped second moment.

    `damping` × the mean of the diagonal is added to the diagonal, and more if the matrix is still
    singular.
    """
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
