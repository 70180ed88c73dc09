"""Wanda: in each row, the weights with the smallest product of weight and input become zero.

Sun et al., 2023, arXiv:2306.11695. The score of w_rc is |w_rc| · ‖x_c‖₂, with the L2 norm of input
channel c over the tokens. Weights of a row are compared with each other; none is changed.
"""

from __future__ import annotations

from torch import Generator, Tensor

from regrow.sparsity.pattern import Sparsity

NEEDS_GRAM = True
PER_ROW = True


def sparsify(
    weight_RC: Tensor,
    sparsity: Sparsity,
    gram_CC: Tensor | None = None,
    damping: float = 0.0,
    draw: Generator | None = None,
) -> Tensor:
    """The weight [R, C] with zeros at the lowest |w| ‖x‖ of each row or group of M.

    The norms are the roots of the diagonal of the inputs' second moment.
    """
    assert gram_CC is not None
    weight_RC = weight_RC.float()
    score_RC = weight_RC.abs() * gram_CC.diagonal().float().sqrt()
    return weight_RC.masked_fill(sparsity.zeros(score_RC, per_row=True), 0)
