"""Functions that the losses share: P and Q, the log of their ratio, their mixture, the gradient.

Shapes: N tokens, V vocabulary entries. No function takes the logarithm of a probability that may
be 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Pair(NamedTuple):
    """The distributions of teacher and student at one temperature."""

    p_NV: Tensor
    """The teacher's probabilities."""
    q_NV: Tensor
    """The student's probabilities."""
    log_ratio_NV: Tensor
    """log p − log q; exactly 0 where the logits are equal."""


def softmax(logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax, the largest logit [N], and the logarithm of its probability [N].

    Largest logit − that logarithm = log Σ exp(logits). The difference of two such values is taken
    part by part, because each sum would be rounded to the float32 precision at the logits: 1e-5
    nats at 80.
    """
    probability_NV = logits_NV.softmax(-1)
    largest, place = logits_NV.max(-1)
    return probability_NV, largest, probability_NV.gather(-1, place[:, None]).squeeze(-1).log()


def over_temperature(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Both logits divided by T; at T = 1, the tensors themselves."""
    if temperature == 1.0:
        return student_NV, teacher_NV
    return student_NV / temperature, teacher_NV / temperature


def distributions(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Pair:
    """P, Q and the logarithm of their ratio; overwrites the teacher's logits."""
    student_NV, teacher_NV = over_temperature(student_NV, teacher_NV, temperature)
    q_NV, largest_s, log_q = softmax(student_NV)
    p_NV, largest_t, log_p = softmax(teacher_NV)
    log_z_N = (largest_t - largest_s) - (log_p - log_q)
    return Pair(p_NV, q_NV, teacher_NV.sub_(student_NV).sub_(log_z_N[:, None]))


def to_mixture(log_ratio_NV: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m) of the mixture m = share · p + (1 − share) · q, 0 < share < 1.

    With r = log p − log q: log(m / q) = log(share · eʳ + 1 − share). The larger of p and q is
    factored out of the logarithm, so that nothing overflows; the rest is exactly 0 at r = 0.
    """
    shares = log_ratio_NV.new_tensor((share, 1 - share))
    of_smaller_NV = torch.where(log_ratio_NV > 0, shares[1], shares[0])
    rest_NV = log_ratio_NV.abs().neg_().expm1_().mul_(of_smaller_NV).log1p_()
    log_p_m = functional.relu(-log_ratio_NV).add_(rest_NV).neg_()
    log_q_m = functional.relu(log_ratio_NV).add_(rest_NV).neg_()
    return log_p_m, log_q_m


def by_logits(slope_NV: Tensor, q_NV: Tensor) -> Tensor:
    """q (g − Σ q g): the gradient with respect to logits / T of a value with derivative g by q.

    A constant added to g has no effect. Overwrites `slope_NV`.
    """
    mean_N1 = torch.linalg.vecdot(q_NV, slope_NV)[:, None]
    return slope_NV.sub_(mean_N1).mul_(q_NV)
