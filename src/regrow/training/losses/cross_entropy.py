"""Cross-entropy against the next token of the text: the hard-label loss."""

from __future__ import annotations

from torch import Tensor

NEEDS_TEACHER = False
OPTIONS = ()


def loss_and_gradient(
    student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """−log q_target at temperature 1; ignores `temperature`. Gradient: q − onehot(target)."""
    log_q_NV = student_NV.log_softmax(-1)
    value_N = -log_q_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    gradient_NV = log_q_NV.exp_()
    gradient_NV[range(len(targets_N)), targets_N] -= 1
    return value_N, gradient_NV
