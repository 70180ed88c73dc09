"""Log-probabilities of given tokens, in chunks: [tokens, vocabulary] is never made.

Shapes: N tokens, H hidden, V vocabulary; those in use are the first `size` of V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regrow.training.head import CHUNK_ELEMENTS, Head
from regrow.training.products import add_product, exact_dtype, split


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
    job = _Job(head, size, compute, exact, chunk)
    found: Tensor = _LogProbabilities.apply(hidden_NH, head.weight_VH, targets_N, job)
    return found


@dataclass(frozen=True)
class _Job:
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
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, job: _Job
    ) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N)
        ctx.job = job
        found_N = hidden_NH.new_empty(len(targets_N), dtype=exact_dtype(hidden_NH.dtype))
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
        job: _Job = ctx.job
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        exact = exact_dtype(hidden_NH.dtype)
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
