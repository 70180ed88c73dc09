"""SparseGPT: zeros column after column, and lets the later columns compensate for the error.

Frantar and Alistarh, 2023, arXiv:2301.00774, by `regrow.calibration.compensate`. At the beginning
of a block of columns (with N:M: of each group of M), the weights with the lowest w_c² / U_cc² in
the block are chosen. This is the error of the output that each one costs after compensation. Zeros
that are there already stay, and count: each block gets its part of those that are missing.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from regrow.calibration import compensate as obs
from regrow.sparsity.pattern import Sparsity, lowest

NEEDS_GRAM = True


def sparsify(
    weight_RC: Tensor,
    sparsity: Sparsity,
    gram_CC: Tensor | None = None,
    damping: float = 0.01,
    draw: Generator | None = None,
) -> Tensor:
    """The weight [R, C] with zeros, and with the weights that stay changed to make up for them."""
    assert gram_CC is not None
    if weight_RC.dtype != torch.float64:
        weight_RC, gram_CC = weight_RC.float(), gram_CC.float()
    factor_CC = obs.inverse_factor(gram_CC, damping)
    diagonal_C = factor_CC.diagonal()
    held_RC = weight_RC == 0
    zero_RC, size = held_RC.clone(), sparsity.of or obs.BLOCK
    free = int((~held_RC).sum())
    missing = max(0.0, sparsity.share * held_RC.numel() - (held_RC.numel() - free))

    def drop(i: int, w_RC: Tensor) -> Tensor:
        if i % size == 0:
            end = min(i + size, w_RC.shape[1])
            held = held_RC[:, i:end]
            score = (w_RC[:, i:end] / diagonal_C[i:end]).square()
            if sparsity.of:
                chosen = sparsity.zeros(score.masked_fill(held, -1), per_row=False)
            else:
                count = round(missing * int((~held).sum()) / max(1, free))
                among_free = score.masked_fill(held, torch.inf).reshape(1, -1)
                chosen = lowest(among_free, count).view_as(score)
            zero_RC[:, i:end] |= chosen
        return w_RC[:, i].masked_fill(zero_RC[:, i], 0)

    return obs.compensate(weight_RC, factor_CC, drop)
