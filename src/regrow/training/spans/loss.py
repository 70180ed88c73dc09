"""The loss of spans: approximate likelihood matching (Minixhofer et al., 2025, arXiv:2503.20083).

Shapes: M spans.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.mix import Mix

LEAST = 1e-12  # nats; a span that is certain has no slope


def span_loss(
    student_M: Tensor, teacher_M: Tensor, mix: Mix, temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """τ · Σ_spans D((p, 1 − p) ‖ (q, 1 − q)), p and q the spans' probabilities to the power 1/τ.

    `student_M`, `teacher_M`: log-probabilities of the spans, each the sum of its tokens'. D is each
    loss of the mix that compares with a teacher: for forward_kl
    p log(p/q) + (1 − p) log((1 − p)/(1 − q)). D falls as 1/τ, which the factor τ undoes. Returns
    the weighted sum, differentiable by the student, and the plain sum of each loss by name.
    """
    ours_M2, theirs_M2 = _binary(student_M, temperature), _binary(teacher_M, temperature).detach()
    total, parts = ours_M2.sum() * 0, {}
    nothing_M = torch.zeros(len(student_M), dtype=torch.int64, device=student_M.device)
    for name, weight, loss, needs_teacher in mix.terms():
        if not needs_teacher:
            continue
        value_M, slope_M2 = loss(ours_M2.detach().clone(), theirs_M2.clone(), nothing_M, 1.0)
        parts[name] = temperature * value_M.sum()
        carried = temperature * (ours_M2 * slope_M2).sum()  # its gradient is that of the value
        total = total + weight * (carried - carried.detach() + parts[name])
    return total, parts


def _binary(log_M: Tensor, temperature: float) -> Tensor:
    """log p and log(1 − p) [M, 2] in float64, p the probability to the power 1/τ."""
    away_M = (-log_M.double()).clamp_min(LEAST) / temperature
    return torch.stack((-away_M, (-torch.expm1(-away_M)).log()), -1)
