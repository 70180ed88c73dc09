"""Reverse KL divergence, from the student to the teacher (MiniLLM; Gu et al., arXiv:2306.08543)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.losses._distributions import by_logits, distributions

NEEDS_TEACHER = True
OPTIONS = ()


def loss_and_gradient(
    student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """T² · Σ_v q_v (log q_v − log p_v). Gradient: T q_v (r_v − Σ q r), r = log q − log p."""
    _, q_NV, log_ratio_NV = distributions(student_NV, teacher_NV, temperature)
    slope_NV = log_ratio_NV.neg_()
    value_N = torch.linalg.vecdot(q_NV, slope_NV)
    return value_N * temperature**2, by_logits(slope_NV, q_NV).mul_(temperature)
