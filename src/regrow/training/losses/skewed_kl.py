"""Skewed forward KL divergence (DistiLLM; Ko et al., 2024, arXiv:2402.03898)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.losses._distributions import by_logits, distributions, to_mixture

NEEDS_TEACHER = True
OPTIONS = ("skew",)


def loss_and_gradient(
    student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, temperature: float, skew: float = 0.1
) -> tuple[Tensor, Tensor]:
    """T² · KL(P ‖ M), M = α P + (1 − α) Q, where α is `skew`, 0 < α < 1. The KL is at most −log α.

    Derivative by q: −(1 − α) p / m. Gradient: T q_v (g_v − Σ q g), g = −(1 − α) (p / m − 1).
    """
    p_NV, q_NV, log_ratio_NV = distributions(student_NV, teacher_NV, temperature)
    log_p_m, _ = to_mixture(log_ratio_NV, skew)
    value_N = torch.linalg.vecdot(p_NV, log_p_m)
    gradient_NV = by_logits(log_p_m.expm1_(), q_NV)
    return value_N * temperature**2, gradient_NV.mul_((skew - 1) * temperature)
