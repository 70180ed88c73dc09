"""Random: any weights of a matrix become zero, for comparison with methods that choose them.

As a control of a lottery ticket: the same number of zeros in each matrix, at other places.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from regrow.sparsity.pattern import Sparsity

NEEDS_GRAM = False


def sparsify(
    weight_RC: Tensor,
    sparsity: Sparsity,
    gram_CC: Tensor | None = None,
    damping: float = 0.0,
    draw: Generator | None = None,
) -> Tensor:
    """The weight [R, C] with zeros at places drawn by `draw`, of the matrix or of each group of M.

    The zeros of a weight that is sparse already stay zero, and count.
    """
    score_RC = torch.rand(weight_RC.shape, generator=draw).to(weight_RC.device)
    score_RC = score_RC.masked_fill(weight_RC == 0, -1)
    return weight_RC.float().masked_fill(sparsity.zeros(score_RC, per_row=False), 0)
