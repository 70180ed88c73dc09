"""Forward KL divergence from the teacher to the student (Hinton et al., 2015)."""

from __future__ import annotations

import torch
from torch import Tensor

NEEDS_TEACHER = True


def loss(
    student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """T² · Σ_v p_v (log p_v − log q_v), p and q the softmax of teacher and student logits over T.

    With p from t and q from s this is Σ p (t − s) − logsumexp(t) + logsumexp(s), which needs no
    logarithm of a probability and is 0 for equal logits. Gradient: T (q − p).
    """
    if temperature != 1.0:
        student_NV, teacher_NV = student_NV / temperature, teacher_NV / temperature
    q_NV, log_z_q = _softmax(student_NV)
    p_NV, log_z_p = _softmax(teacher_NV)
    difference_NV = teacher_NV.sub_(student_NV)
    value_N = torch.linalg.vecdot(p_NV, difference_NV) - log_z_p + log_z_q
    return value_N * temperature**2, q_NV.sub_(p_NV).mul_(temperature)


def _softmax(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and the logarithm of its normaliser, the latter read off at the largest logit."""
    probability_NV = logits_NV.softmax(-1)
    largest, place = logits_NV.max(-1)
    log_z = largest - probability_NV.gather(-1, place[:, None]).squeeze(-1).log()
    return probability_NV, log_z
