"""Every output loss by its definition, on whole logits, for autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from regrow import plugins

BETA, SKEW = 0.3, 0.1  # neither is 1/2, where the two ends of a mixture cannot be told apart


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def mixture(log_p: Tensor, log_q: Tensor, share_of_p: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(share_of_p), log_q + math.log(1 - share_of_p))


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = mixture(log_p, log_q, BETA)
    return BETA * kl(log_p, log_m) + (1 - BETA) * kl(log_q, log_m)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "jsd": jsd,
    "skewed_kl": lambda log_p, log_q: kl(log_p, mixture(log_p, log_q, SKEW)),
    "skewed_reverse_kl": lambda log_p, log_q: kl(log_q, mixture(log_p, log_q, 1 - SKEW)),
    "total_variation": lambda log_p, log_q: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
}
NAMES = sorted([*DIVERGENCES, "cross_entropy"])
LOSSES = "regrow.training.losses"
FUSED = [
    name
    for name in plugins.names(LOSSES)
    if hasattr(plugins.load(LOSSES, name), "loss_and_gradient")
]
"""The losses with a written gradient; the others are formulas, for autograd as they are."""


def slow(
    name: str, student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, temperature: float
) -> Tensor:
    """The value of each token [N], differentiable."""
    student_NV, teacher_NV = student_NV.double(), teacher_NV.double()
    if name not in NAMES:
        module = plugins.load(LOSSES, name)
        options = {key: {"beta": BETA, "skew": SKEW}[key] for key in module.OPTIONS}
        value_N: Tensor = module.loss(student_NV, teacher_NV, targets_N, temperature, **options)
        return value_N
    if name == "cross_entropy":
        return -student_NV.log_softmax(-1)[torch.arange(len(targets_N)), targets_N]
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (teacher_NV, student_NV))
    return temperature**2 * DIVERGENCES[name](log_p, log_q)


def slow_gradient(
    name: str, student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, temperature: float
) -> Tensor:
    """The gradient of the sum by the student's logits [N, V], in float64."""
    student_NV = student_NV.detach().double().requires_grad_()
    total = slow(name, student_NV, teacher_NV, targets_N, temperature).sum()
    return torch.autograd.grad(total, student_NV)[0]
