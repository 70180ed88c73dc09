"""Forward KL divergence from the teacher to the student (Hinton et al., 2015, arXiv:1503.02531)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.losses._distributions import over_temperature, softmax

NEEDS_TEACHER = True
OPTIONS = ()


def loss_and_gradient(
    student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """T² · Σ_v p_v (log p_v − log q_v), where p = softmax(t), q = softmax(s).

    t and s are the teacher's and the student's logits, divided by T. The sum is computed as
    Σ p (t − s) − logsumexp(t) + logsumexp(s), which needs no logarithm of a probability and is 0
    for equal logits. Gradient: T (q − p).
    """
    student_NV, teacher_NV = over_temperature(student_NV, teacher_NV, temperature)
    q_NV, largest_s, log_q = softmax(student_NV)
    p_NV, largest_t, log_p = softmax(teacher_NV)
    log_z_N = (largest_t - largest_s) - (log_p - log_q)
    value_N = torch.linalg.vecdot(p_NV, teacher_NV.sub_(student_NV)) - log_z_N
    return value_N * temperature**2, q_NV.sub_(p_NV).mul_(temperature)
