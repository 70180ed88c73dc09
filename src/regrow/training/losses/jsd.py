"""Generalized Jensen-Shannon divergence (GKD; Agarwal et al., 2024, arXiv:2306.13649)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.losses._distributions import by_logits, distributions, to_mixture

NEEDS_TEACHER = True
OPTIONS = ("beta",)


def loss_and_gradient(
    student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, temperature: float, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """T² · (β KL(P ‖ M) + (1 − β) KL(Q ‖ M)), M = β P + (1 − β) Q, 0 < β < 1.

    P is the teacher. For β near 0 the value is about β times the forward KL; for β near 1 it is
    about 1 − β times the reverse KL. The entropy of (β, 1 − β), at most ln 2, is an upper bound of
    the divergence. Gradient: T (1 − β) q_v (r_v − Σ q r), r = log q − log m.
    """
    p_NV, q_NV, log_ratio_NV = distributions(student_NV, teacher_NV, temperature)
    log_p_m, log_q_m = to_mixture(log_ratio_NV, beta)
    value_N = torch.linalg.vecdot(p_NV, log_p_m) * beta
    value_N += torch.linalg.vecdot(q_NV, log_q_m) * (1 - beta)
    gradient_NV = by_logits(log_q_m, q_NV)
    return value_N * temperature**2, gradient_NV.mul_((1 - beta) * temperature)
