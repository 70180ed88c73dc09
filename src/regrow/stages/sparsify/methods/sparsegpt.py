"""SparseGPT: zeros column after column, and lets the later columns compensate for the error.

Frantar and Alistarh, 2023, arXiv:2301.00774, by `regrow.calibration.compensate`. At the beginning
of a block of columns (with N:M: of each group of M), the weights with the lowest w_c² / U_cc² in
the block are chosen. This is the error of the output that each one costs after compensation.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from regrow.calibration import compensate as obs
from regrow.sparsity import zeros
from regrow.sparsity.pattern import Sparsity

NEEDS_GRAM = True


def sparsify(
    weight_RC: Tensor,
    sparsity: Sparsity,
    gram_CC: Tensor | None = None,
    damping: float = 0.01,
    draw: Generator | None = None,
) -> Tensor:
    """The weight [R, C] with zeros, and with the weights that stay changed to make up for them.

    The zeros of a weight that is sparse already stay zero.
    """
    assert gram_CC is not None
    if weight_RC.dtype != torch.float64:
        weight_RC, gram_CC = weight_RC.float(), gram_CC.float()
    factor_CC = obs.inverse_factor(gram_CC, damping)
    diagonal_C = factor_CC.diagonal()
    held_RC = zeros.held(weight_RC)
    zero_RC = torch.zeros_like(weight_RC, dtype=torch.bool)
    size = sparsity.of or obs.BLOCK

    def drop(i: int, w_RC: Tensor) -> Tensor:
        if i % size == 0:
            end = min(i + size, w_RC.shape[1])
            score = (w_RC[:, i:end] / diagonal_C[i:end]).square()
            if held_RC is not None:
                score = score.masked_fill(held_RC[:, i:end], -1)
            zero_RC[:, i:end] = sparsity.zeros(score, per_row=False)
            if held_RC is not None:
                zero_RC[:, i:end] |= held_RC[:, i:end]
        return w_RC[:, i].masked_fill(zero_RC[:, i], 0)

    return obs.compensate(weight_RC, factor_CC, drop)
