"""A teacher with another tokenizer, which reads the text of a batch in its own tokens.

The loss is approximate likelihood matching (Minixhofer et al., 2025, arXiv:2503.20083). The
log-probabilities of tokens are computed in chunks: full logits [tokens, vocabulary] are never in
memory.

Shapes: B sequences, T tokens of the student, N tokens in spans, M spans, H hidden channels, V
vocabulary entries, of which the first `size` are in use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from regrow.runtime.chunks import head_chunk
from regrow.runtime.precision import float32_at_least
from regrow.training.cross_tokenizer.align import Aligner, Tokens
from regrow.training.head import (
    Head,
    add_product,
    head_loss,
    head_of,
    split,
)
from regrow.training.loss_weights import LossWeights
from regrow.training.teacher import Teacher, hidden_states, scored


def log_probabilities(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    size: int,
    exact: bool = False,
    chunk_tokens: int | None = None,
) -> Tensor:
    """log softmax(logits)[target] [N] over the first `size` ids, in float32 or float64.

    Differentiable with respect to the hidden states and the head. The gradient of each token is
    known only after the forward pass, so the backward pass recomputes the logits, chunk by chunk.
    """
    compute = hidden_NH.dtype
    if torch.is_autocast_enabled(hidden_NH.device.type):
        compute = torch.get_autocast_dtype(hidden_NH.device.type)
    chunk = chunk_tokens or head_chunk(hidden_NH.device.type, size).tokens
    inputs = _Inputs(head, size, compute, exact, chunk)
    log_q_N: Tensor = _LogProbabilities.apply(hidden_NH, head.weight_VH, targets_N, inputs)
    return log_q_N


@dataclass(frozen=True)
class _Inputs:
    """The inputs of `_LogProbabilities` that have no gradient."""

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
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, inputs: _Inputs
    ) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N)
        ctx.inputs = inputs
        log_q_N = hidden_NH.new_empty(len(targets_N), dtype=float32_at_least(hidden_NH.dtype))
        with torch.autocast(hidden_NH.device.type, enabled=False):
            own_VH = inputs.weight(weight_VH)
            for part in inputs.parts(len(targets_N)):
                own_NH = hidden_NH[part].detach().to(inputs.compute)
                log_q_NV = inputs.head.logits(own_NH, own_VH, inputs.exact).log_softmax(-1)
                log_q_N[part] = log_q_NV.gather(-1, targets_N[part, None]).squeeze(-1)
        return log_q_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale_N: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient with respect to the logits is scale · (onehot(target) − q)."""
        hidden_NH, weight_VH, targets_N = ctx.saved_tensors
        inputs: _Inputs = ctx.inputs
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        exact = float32_at_least(hidden_NH.dtype)
        by_hidden = torch.empty_like(hidden_NH) if wants_hidden else None
        by_weight = torch.zeros_like(weight_VH, dtype=exact) if wants_weight else None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            own_VH = inputs.weight(weight_VH)
            for part in inputs.parts(len(targets_N)):
                own_NH = hidden_NH[part].detach().to(inputs.compute)
                logits_NV = inputs.head.logits(own_NH, own_VH, inputs.exact)
                gradient_NV = logits_NV.softmax(-1).neg_()
                gradient_NV[range(len(own_NH)), targets_N[part]] += 1
                gradient_NV.mul_(scale_N[part, None])
                gradient_NV = inputs.head.through_cap(gradient_NV, logits_NV)
                parts_NV = split(gradient_NV, inputs.compute, inputs.exact)
                if by_hidden is not None:
                    sum_NH = torch.zeros_like(own_NH, dtype=exact)
                    add_product(sum_NH, parts_NV, own_VH)
                    by_hidden[part] = sum_NH.to(by_hidden.dtype)
                if by_weight is not None:
                    parts_VN = tuple(part_NV.T for part_NV in parts_NV)
                    add_product(by_weight[: inputs.size], parts_VN, own_NH)
        if by_weight is not None:
            by_weight = by_weight.to(weight_VH.dtype)
        return by_hidden, by_weight, None, None


LEAST = 1e-12
"""In nats: the log-probability of a certain span is kept below 0, where the slope is finite."""


def span_loss(
    student_M: Tensor, teacher_M: Tensor, loss_weights: LossWeights, temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """τ · Σ_spans D((p, 1 − p) ‖ (q, 1 − q)), p and q the spans' probabilities to the power 1/τ.

    `student_M` and `teacher_M` are the log-probabilities of the spans, the sums over their tokens.
    D is each loss that reads the teacher's logits; for forward_kl it is
    p log(p/q) + (1 − p) log((1 − p)/(1 − q)). D is proportional to 1/τ, hence the factor τ. Returns
    the weighted sum, which is differentiable with respect to `student_M`, and the unweighted sum of
    each loss by name.
    """
    log_q_M2 = _binary(student_M, temperature)
    log_p_M2 = _binary(teacher_M, temperature).detach()
    total, parts = log_q_M2.sum() * 0, {}
    no_targets_M = torch.zeros(len(student_M), dtype=torch.int64, device=student_M.device)
    for name, weight, loss, needs_teacher in loss_weights.terms():
        if not needs_teacher:
            continue
        value_M, slope_M2 = loss(log_q_M2.detach().clone(), log_p_M2.clone(), no_targets_M, 1.0)
        parts[name] = temperature * value_M.sum()
        linear = temperature * (log_q_M2 * slope_M2).sum()  # has the gradient of the value
        total = total + weight * (linear - linear.detach() + parts[name])
    return total, parts


def _binary(log_M: Tensor, temperature: float) -> Tensor:
    """log p and log(1 − p) [M, 2] in float64, where p is the probability to the power 1/τ."""
    away_M = (-log_M.double()).clamp_min(LEAST) / temperature
    return torch.stack((-away_M, (-torch.expm1(-away_M)).log()), -1)


IN_SPANS = "in_spans"
"""The name of a logged value: the share of the scored tokens that are in spans."""


class CrossTokenizerTeacher:
    """Compares the probabilities of text spans instead of distributions over tokens."""

    def __init__(self, teacher: Teacher, aligner: Aligner, temperature: float) -> None:
        self.teacher, self.aligner, self.temperature = teacher, aligner, temperature

    def outputs(
        self, student: PreTrainedModel, batch: dict[str, Tensor], loss_weights: LossWeights
    ) -> dict[str, Any]:
        """The outputs that `bind_loss` defines; names of losses over spans begin with `span_`."""
        mask = scored(batch)
        final_BTH, head = hidden_states(student, batch).final, head_of(student)
        plain = {name: weight for name, weight, _, needs in loss_weights.terms() if not needs}
        total, parts = torch.zeros((), device=final_BTH.device), dict[str, Tensor]()
        if plain:
            used = replace(head, weight_VH=head.weight_VH[: len(self.aligner.student_bytes)])
            targets_N = batch["labels"][:, 1:][mask]
            of_text = replace(loss_weights, weights=plain)
            total, parts = head_loss(final_BTH[mask], used, targets_N, of_text)
        if loss_weights.needs_teacher:
            more, span_parts, count = self._compare(final_BTH, head, batch, loss_weights)
            total = total + more
            parts = {**{f"span_{name}": value for name, value in span_parts.items()}, **parts}
            parts[IN_SPANS] = torch.tensor(float(count), device=final_BTH.device)
        outputs: dict[str, Any] = {"loss": total, "main": total.detach(), "parts": parts}
        return {**outputs, "tokens": mask.sum(), "counts": {}}

    def _compare(
        self, final_BTH: Tensor, head: Head, batch: dict[str, Tensor], loss_weights: LossWeights
    ) -> tuple[Tensor, dict[str, Tensor], int]:
        """The weighted loss over spans, the sum of each loss, and the student's tokens in spans."""
        aligned, exact = self.aligner.batch(batch), loss_weights.exact
        device = self.teacher.model.device
        inputs = {name: tensor.to(device) for name, tensor in aligned.batch.items()}
        with torch.no_grad():
            states = self.teacher.hidden(inputs).final
            teacher_M = _summed(
                states, self.teacher.head, aligned.teacher, aligned.spans, None, exact
            )
        size = len(self.aligner.student_bytes)
        student_M = _summed(final_BTH, head, aligned.student, aligned.spans, size, exact)
        teacher_M = teacher_M.to(student_M.device)
        loss, parts = span_loss(student_M, teacher_M, loss_weights, self.temperature)
        return loss, parts, len(aligned.student.at)


def _summed(
    final_BTH: Tensor, head: Head, tokens: Tokens, spans: int, size: int | None, exact: bool
) -> Tensor:
    """The log-probability [M] of each span, the sum over its tokens, in float64."""
    device = final_BTH.device
    at, targets_N, span_N = (
        torch.tensor(values, dtype=torch.int64, device=device)
        for values in (tokens.at, tokens.target, tokens.span)
    )
    hidden_NH = final_BTH.flatten(0, 1).index_select(0, at)
    ids = min(head.rows, size or head.rows)
    log_N = log_probabilities(hidden_NH, head, targets_N, ids, exact).double()
    return torch.zeros(spans, dtype=torch.float64, device=device).index_add(0, span_N, log_N)
