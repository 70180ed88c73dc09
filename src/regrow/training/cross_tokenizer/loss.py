"""The loss of spans: approximate likelihood matching (Minixhofer et al., 2025, arXiv:2503.20083).

Log-probabilities of given tokens come in chunks: [tokens, vocabulary] is never made.

Shapes: M spans, N tokens, H hidden, V vocabulary; those in use are the first `size` of V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regrow.runtime.precision import float32_at_least
from regrow.training.head import CHUNK_ELEMENTS, Head
from regrow.training.loss_weights import LossWeights
from regrow.training.products import add_product, split


def log_probabilities(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    size: int,
    exact: bool = False,
    chunk_tokens: int | None = None,
) -> Tensor:
    """log softmax(logits)[target] [N] over the first `size` ids, float32 at least.

    Differentiable by hidden states and head. What follows from the values decides how much each
    token counts, so the logits are made a second time, chunk by chunk, for the gradients.
    """
    compute = hidden_NH.dtype
    if torch.is_autocast_enabled(hidden_NH.device.type):
        compute = torch.get_autocast_dtype(hidden_NH.device.type)
    chunk = chunk_tokens or max(16, CHUNK_ELEMENTS // size)
    job = _Chunked(head, size, compute, exact, chunk)
    found: Tensor = _LogProbabilities.apply(hidden_NH, head.weight_VH, targets_N, job)
    return found


@dataclass(frozen=True)
class _Chunked:
    head: Head
    size: int
    compute: torch.dtype
    exact: bool
    chunk: int

    def parts(self, count: int) -> list[slice]:
        return [slice(begin, begin + self.chunk) for begin in range(0, count, self.chunk)]

    def weight(self, weight_VH: Tensor) -> Tensor:
        return weight_VH[: self.size].detach().to(self.compute)


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, job: _Chunked
    ) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N)
        ctx.job = job
        found_N = hidden_NH.new_empty(len(targets_N), dtype=float32_at_least(hidden_NH.dtype))
        with torch.autocast(hidden_NH.device.type, enabled=False):
            own_VH = job.weight(weight_VH)
            for part in job.parts(len(targets_N)):
                own_NH = hidden_NH[part].detach().to(job.compute)
                log_q_NV = job.head.logits(own_NH, own_VH, job.exact).log_softmax(-1)
                found_N[part] = log_q_NV.gather(-1, targets_N[part, None]).squeeze(-1)
        return found_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale_N: Tensor) -> tuple[Tensor | None, ...]:
        """By the logits: scale · (onehot(target) − q)."""
        hidden_NH, weight_VH, targets_N = ctx.saved_tensors
        job: _Chunked = ctx.job
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        exact = float32_at_least(hidden_NH.dtype)
        by_hidden = torch.empty_like(hidden_NH) if wants_hidden else None
        by_weight = torch.zeros_like(weight_VH, dtype=exact) if wants_weight else None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            own_VH = job.weight(weight_VH)
            for part in job.parts(len(targets_N)):
                own_NH = hidden_NH[part].detach().to(job.compute)
                logits_NV = job.head.logits(own_NH, own_VH, job.exact)
                gradient_NV = logits_NV.softmax(-1).neg_()
                gradient_NV[range(len(own_NH)), targets_N[part]] += 1
                gradient_NV.mul_(scale_N[part, None])
                gradient_NV = job.head.through_cap(gradient_NV, logits_NV)
                parts_NV = split(gradient_NV, job.compute, job.exact)
                if by_hidden is not None:
                    sum_NH = torch.zeros_like(own_NH, dtype=exact)
                    add_product(sum_NH, parts_NV, own_VH)
                    by_hidden[part] = sum_NH.to(by_hidden.dtype)
                if by_weight is not None:
                    parts_VN = tuple(part_NV.T for part_NV in parts_NV)
                    add_product(by_weight[: job.size], parts_VN, own_NH)
        if by_weight is not None:
            by_weight = by_weight.to(weight_VH.dtype)
        return by_hidden, by_weight, None, None


LEAST = 1e-12  # nats; a span that is certain has no slope


def span_loss(
    student_M: Tensor, teacher_M: Tensor, mix: LossWeights, temperature: float
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
