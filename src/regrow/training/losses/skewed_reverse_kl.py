"""Skewed reverse KL divergence (DistiLLM; Ko et al., 2024, arXiv:2402.03898)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.losses._distributions import by_logits, distributions, to_mixture

NEEDS_TEACHER = True
OPTIONS = ("skew",)


def loss_and_gradient(
    student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, temperature: float, skew: float = 0.1
) -> tuple[Tensor, Tensor]:
    """T² · KL(Q ‖ M), M = (1 − α) P + α Q, where α is `skew`, 0 < α < 1. The KL is at most −log α.

    Derivative by q: log(q / m) + 1 − α q / m.
    Gradient: T q_v (g_v − Σ q g), g = log(q / m) − α (q / m − 1).
    """
    _, q_NV, log_ratio_NV = distributions(student_NV, teacher_NV, temperature)
    _, log_q_m = to_mixture(log_ratio_NV, 1 - skew)
    value_N = torch.linalg.vecdot(q_NV, log_q_m)
    slope_NV = log_q_m.sub_(log_q_m.expm1().mul_(skew))
    return value_N * temperature**2, by_logits(slope_NV, q_NV).mul_(temperature)
