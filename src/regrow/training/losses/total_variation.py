"""Total variation distance (f-distill; Wen et al., 2023, arXiv:2307.15190)."""

from __future__ import annotations

from torch import Tensor

from regrow.training.losses._distributions import by_logits, over_temperature

NEEDS_TEACHER = True
OPTIONS = ()


def loss_and_gradient(
    student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """T² · ½ Σ_v |p_v − q_v|, between 0 and T²; the unit is probability, not nats.

    Gradient: T ½ q_v (g_v − Σ q g), g = sign(q − p), which is 0 where p = q.
    """
    student_NV, teacher_NV = over_temperature(student_NV, teacher_NV, temperature)
    q_NV, p_NV = student_NV.softmax(-1), teacher_NV.softmax(-1)
    difference_NV = p_NV.neg_().add_(q_NV)
    value_N = difference_NV.abs().sum(-1) / 2
    gradient_NV = by_logits(difference_NV.sign_(), q_NV)
    return value_N * temperature**2, gradient_NV.mul_(temperature / 2)
