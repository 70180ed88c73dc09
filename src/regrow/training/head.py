"""Computes the output head and the loss in chunks of tokens; full logits are never in memory.

Shapes: N scored tokens, H hidden channels, V vocabulary entries; `student_NH` is [N, H].

Gradients are computed in the forward pass. The factors of matrix products have the compute dtype;
softmax and sums are in float32. The gradient with respect to the logits is computed chunk by chunk.
Several chunks are then multiplied at once, because every product for the head's weights reads and
writes a float32 tensor [V, H].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regrow.errors import UserError
from regrow.runtime.chunks import HeadChunk, head_chunk
from regrow.runtime.precision import float32_at_least
from regrow.training.cache.sparse import Sparse
from regrow.training.loss_weights import LossWeights

ADDED_ELEMENTS = 1 << 23
"""The number of elements of a product that are added at once: 32 MB in float32."""


@dataclass(frozen=True)
class Head:
    """An output projection: weight [V, H] and the cap of Gemma's logit soft-capping, if any."""

    weight_VH: Tensor
    softcap: float | None = None
    scale: float = 1.0
    """What the model multiplies its logits by, before the cap (Cohere, Granite)."""

    def logits(self, hidden_NH: Tensor, weight_VH: Tensor, exact: bool = False) -> Tensor:
        """The logits [N, V] of final hidden states, in float32 or float64.

        `weight_VH` has the dtype of the states. Except on CUDA, logits of half-precision factors
        are rounded to half precision unless `exact`.
        """
        logits_NV = product(hidden_NH, weight_VH.T, exact)
        if self.scale != 1.0:
            logits_NV = logits_NV.mul_(self.scale)
        if self.softcap is not None:
            logits_NV = logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def through_cap(self, gradient_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """Backpropagate a gradient through cap and scale, from the logits to the plain product."""
        if self.softcap is not None:
            gradient_NV = gradient_NV * (1 - (logits_NV / self.softcap) ** 2)
        return gradient_NV if self.scale == 1.0 else gradient_NV * self.scale

    @property
    def rows(self) -> int:
        """The number of token ids with a logit."""
        return len(self.weight_VH)

    def to(self, dtype: torch.dtype) -> Head:
        """The same head with weights of another dtype."""
        return replace(self, weight_VH=self.weight_VH.to(dtype))

    def target(self, hidden_NH: Tensor, rows: int, loss_weights: LossWeights) -> Tensor:
        """The logits [N, rows] that a student learns from."""
        return self.logits(hidden_NH, self.weight_VH[:rows], loss_weights.exact)


class TeacherTarget(Protocol):
    """The source of a teacher's logits: one Head, or a `TeacherMixture` of several."""

    @property
    def rows(self) -> int:
        """The number of token ids with a logit."""

    def to(self, dtype: torch.dtype) -> TeacherTarget:
        """The same target with weights of another dtype."""

    def target(self, hidden_NH: Tensor, rows: int, loss_weights: LossWeights) -> Tensor:
        """The logits [N, rows] that a student learns from."""


def head_of(model: Any) -> Head:
    """The output head of a stock causal language model.

    Raises UserError for a head with a bias. `model_check.check_model` detects the other heads that
    this class does not reproduce.
    """
    config = model.config
    output = model.get_output_embeddings()
    if output.bias is not None:
        raise UserError(f"{config.model_type} has a bias in its output head: not supported")
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(output.weight, softcap, scale_of(config.to_dict()))


def scale_of(config: dict[str, Any]) -> float:
    """What a model of this config multiplies its logits by: Cohere's or Granite's config key."""
    times, divided = config.get("logit_scale"), config.get("logits_scaling")
    return float(1.0 if times is None else times) / float(divided or 1.0)


def head_loss(
    student_NH: Tensor,
    student: Head,
    targets_N: Tensor,
    loss_weights: LossWeights,
    teacher_NH: Tensor | None = None,
    teacher: TeacherTarget | None = None,
    chunk_tokens: int | None = None,
    sparse: Sparse | None = None,
    source_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses over N tokens, and the unweighted sum of each loss by name.

    The weighted sum is differentiable with respect to `student_NH` and the head. The unweighted
    sums are in nats. Vocabularies of different sizes (padding) are compared on the ids that both
    have. If N is 0, the sum is a differentiable 0. With `sparse` the forward KL is computed against
    the distributions of a cache. With `source_N` each token has only the losses of its source,
    `loss_weights.by_source`.
    """
    compute = torch.get_autocast_dtype(student_NH.device.type)
    if not torch.is_autocast_enabled(student_NH.device.type):
        compute = student_NH.dtype
    chunk = head_chunk(student_NH.device.type, student.rows)
    if chunk_tokens is not None:
        chunk = chunk._replace(tokens=chunk_tokens)
    groups = (loss_weights,) if source_N is None else loss_weights.groups[1:]
    inputs = _Inputs(student, teacher, groups, compute, chunk, sparse, source_N)
    weight_VH = student.weight_VH
    if not torch.is_grad_enabled():  # an autograd.Function would compute gradients even then
        student_NH, weight_VH = student_NH.detach(), weight_VH.detach()
    total, *values = _HeadLoss.apply(student_NH, weight_VH, targets_N, teacher_NH, inputs)
    parts: dict[str, Tensor] = {}
    names = (name for group in groups for name in group.weights)
    for name, value in zip(names, values, strict=True):
        parts[name] = parts[name] + value if name in parts else value
    return total, parts


@dataclass(frozen=True)
class _Inputs:
    """The inputs of `_HeadLoss` that have no gradient."""

    student: Head
    teacher: TeacherTarget | None
    groups: tuple[LossWeights, ...]
    """One element for all tokens or, with `source_N`, one for the tokens of each source."""
    compute: torch.dtype
    size: HeadChunk
    sparse: Sparse | None
    source_N: Tensor | None

    @property
    def exact(self) -> bool:
        return self.groups[0].exact

    @property
    def chunk(self) -> int:
        """The number of tokens in a chunk."""
        return self.size.tokens

    @property
    def together(self) -> int:
        """The number of tokens in the chunks that are multiplied at once."""
        return self.size.tokens * self.size.together


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        teacher_NH: Tensor | None,
        inputs: _Inputs,
    ) -> tuple[Tensor, ...]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        sums = _Sums(student_NH, weight_VH, inputs, wants_hidden, wants_weight)
        with torch.autocast(student_NH.device.type, enabled=False):
            for begin in range(0, len(targets_N), inputs.together):
                end = min(begin + inputs.together, len(targets_N))
                sums.add(slice(begin, end), targets_N, teacher_NH)
        ctx.gradients = (sums.hidden_gradient, sums.weight_gradient)
        values = sums.values.to(float32_at_least(student_NH.dtype))
        weights = values.new_tensor([w for group in inputs.groups for w in group.weights.values()])
        parts = [part.clone() for part in values]
        ctx.mark_non_differentiable(*parts)
        # A matrix product would be rounded to half precision by autocast.
        return ((values * weights).sum(), *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.gradients
        ctx.gradients = (None, None)
        return (
            None if hidden is None else hidden.mul_(scale.to(hidden.dtype)),
            None if weight is None else weight.mul_(scale.to(weight.dtype)),
            None,
            None,
            None,
        )


class _Sums:
    """The running sums of loss values and gradients over the chunks."""

    def __init__(
        self,
        student_NH: Tensor,
        weight_VH: Tensor,
        inputs: _Inputs,
        wants_hidden: bool,
        wants_weight: bool,
    ) -> None:
        self.inputs, self.student_NH = inputs, student_NH
        self.weight_VH = weight_VH.detach().to(inputs.compute)
        self.teacher = None if inputs.teacher is None else inputs.teacher.to(inputs.compute)
        self.shared = len(self.weight_VH)
        """The number of ids that student and teacher both have."""
        if self.teacher is not None:
            self.shared = min(self.shared, self.teacher.rows)
        if inputs.sparse is not None:
            self.shared = min(self.shared, inputs.sparse.vocab_size)
        self.terms = [group.terms() for group in inputs.groups]
        count = sum(map(len, self.terms))
        self.values = torch.zeros(count, dtype=torch.float64, device=student_NH.device)
        self.hidden_gradient = torch.empty_like(student_NH) if wants_hidden else None
        self.weight_gradient = (
            torch.zeros_like(weight_VH, dtype=float32_at_least(student_NH.dtype))
            if wants_weight
            else None
        )
        self.slopes: tuple[Tensor, ...] = ()
        """Gradients with respect to the logits, in the parts of `split`, to be multiplied next."""

    def add(self, part: slice, targets_N: Tensor, teacher_NH: Tensor | None) -> None:
        """Add values and gradients of the tokens in `part`, which has one or more chunks."""
        hidden_NH = self.student_NH[part].detach().to(self.inputs.compute)
        weight_VH = self.weight_VH[: self.shared]
        for begin in range(part.start, part.stop, self.inputs.chunk):
            chunk = slice(begin, min(begin + self.inputs.chunk, part.stop))
            rows = slice(chunk.start - part.start, chunk.stop - part.start)
            logits_NV = self.inputs.student.logits(hidden_NH[rows], weight_VH, self.inputs.exact)
            gradient_NV = self._gradient(chunk, logits_NV, targets_N, teacher_NH)
            if self.hidden_gradient is not None or self.weight_gradient is not None:
                self._keep(rows, self.inputs.student.through_cap(gradient_NV, logits_NV))
        slopes_NV = tuple(slope_NV[: len(hidden_NH)] for slope_NV in self.slopes)
        if self.hidden_gradient is not None:
            sum_NH = torch.zeros_like(hidden_NH, dtype=float32_at_least(hidden_NH.dtype))
            add_product(sum_NH, slopes_NV, weight_VH)
            self.hidden_gradient[part] = sum_NH.to(self.hidden_gradient.dtype)
        if self.weight_gradient is not None:
            slopes_VN = tuple(slope_NV.T for slope_NV in slopes_NV)
            add_product(self.weight_gradient[: self.shared], slopes_VN, hidden_NH)

    def _keep(self, rows: slice, gradient_NV: Tensor) -> None:
        """Store a chunk's gradient with respect to the logits in its rows of `slopes`."""
        parts_NV = split(gradient_NV, self.inputs.compute, self.inputs.exact)
        if not self.slopes:
            size = (min(self.inputs.together, len(self.student_NH)), self.shared)
            self.slopes = tuple(part_NV.new_empty(size) for part_NV in parts_NV)
        for slope_NV, part_NV in zip(self.slopes, parts_NV, strict=True):
            slope_NV[rows] = part_NV

    def _gradient(
        self, chunk: slice, logits_NV: Tensor, targets_N: Tensor, teacher_NH: Tensor | None
    ) -> Tensor:
        """The weighted sum's gradient with respect to the student's logits.

        Also adds the value of each loss to the sums.
        """
        teacher_NV = logits_NV
        sparse = None if self.inputs.sparse is None else self.inputs.sparse[chunk]
        if self.teacher is not None and teacher_NH is not None:
            hidden_NH = teacher_NH[chunk].to(self.inputs.compute)
            teacher_NV = self.teacher.target(hidden_NH, self.shared, self.inputs.groups[0])
        if self.inputs.source_N is None:
            keep = self.inputs.student.softcap is not None
            return self._weighted(0, logits_NV, teacher_NV, targets_N[chunk], sparse, keep)
        gradient_NV = torch.zeros_like(logits_NV)
        for group in range(len(self.terms)):
            rows = (self.inputs.source_N[chunk] == group).nonzero().squeeze(1)
            if len(rows):
                gradient_NV[rows] = self._weighted(
                    group,
                    logits_NV[rows],
                    teacher_NV[rows],
                    targets_N[chunk][rows],
                    None if sparse is None else sparse[rows],
                )
        return gradient_NV

    def _weighted(
        self,
        group: int,
        logits_NV: Tensor,
        teacher_NV: Tensor,
        targets_N: Tensor,
        sparse: Sparse | None,
        keep: bool = False,
    ) -> Tensor:
        """The gradient of a group's weighted losses; overwrites the logits unless `keep`."""
        # A loss may overwrite its inputs, so only the last one gets the original tensors.
        terms, temperature = self.terms[group], self.inputs.groups[group].temperature
        first = sum(map(len, self.terms[:group]))
        total: Tensor | None = None
        for place, term in enumerate(terms):
            last = place == len(terms) - 1
            student_in = logits_NV if last and not keep else logits_NV.clone()
            teacher_in = teacher_NV if last else teacher_NV.clone()
            if sparse is not None and term.needs_teacher:
                value_N, gradient_NV = sparse.loss(student_in)
            else:
                value_N, gradient_NV = term.loss(student_in, teacher_in, targets_N, temperature)
            self.values[first + place] += value_N.sum(dtype=torch.float64)
            if term.weight != 1.0:
                gradient_NV = gradient_NV.mul_(term.weight)
            total = gradient_NV if total is None else total.add_(gradient_NV)
        assert total is not None, "a group has at least one loss"
        return total


# Matrix products of half-precision factors with a float32 result. CUDA supports them. On other
# devices the result is rounded to half precision. `exact` then adds the rounding errors of the
# result and of a factor. They are small, so half precision represents them well: in bfloat16 with
# an error of 2⁻¹⁸ of the result. This needs two products instead of one, or three if a factor is
# split.


def product(left_MK: Tensor, right_KN: Tensor, exact: bool) -> Tensor:
    """left @ right in float32, or in float64 for float64 factors."""
    if _widens(left_MK):
        return torch.mm(left_MK, right_KN, out_dtype=torch.float32)
    rounded_MN = left_MK @ right_KN
    result_MN = rounded_MN.to(float32_at_least(rounded_MN.dtype))
    if exact and result_MN.dtype != rounded_MN.dtype:
        result_MN.add_(rounded_MN.addmm_(left_MK, right_KN, beta=-1))
    return result_MN


def split(factor: Tensor, dtype: torch.dtype, exact: bool) -> tuple[Tensor, ...]:
    """Convert a float32 factor to `dtype`; if `exact`, its rounding error is a second part.

    Overwrites the factor if `exact`.
    """
    high = factor.to(dtype)
    if not exact or high.dtype == factor.dtype:
        return (high,)
    return high, factor.sub_(high).to(dtype)


def add_product(sum_MN: Tensor, parts_MK: tuple[Tensor, ...], right_KN: Tensor) -> None:
    """Add left @ right to a float32 sum, where `parts_MK` are the parts of left from `split`.

    Adds some rows at a time, because the product itself takes memory, in both dtypes.
    """
    rows = max(1, ADDED_ELEMENTS // max(1, sum_MN.shape[1]))
    for begin in range(0, len(sum_MN), rows):
        part = slice(begin, begin + rows)
        _add(sum_MN[part], tuple(part_MK[part] for part_MK in parts_MK), right_KN)


def _add(sum_MN: Tensor, parts_MK: tuple[Tensor, ...], right_KN: Tensor) -> None:
    if _widens(right_KN):
        for part_MK in parts_MK:
            sum_MN.add_(torch.mm(part_MK, right_KN, out_dtype=torch.float32))
        return
    high_MK, *low = parts_MK
    rounded_MN = high_MK @ right_KN
    sum_MN.add_(rounded_MN)
    for low_MK in low:
        rounded_MN.addmm_(high_MK, right_KN, beta=-1).addmm_(low_MK, right_KN)
        sum_MN.add_(rounded_MN)


def _widens(factor: Tensor) -> bool:
    if factor.device.type != "cuda" or torch.version.cuda is None or torch.__version__ < "2.8":
        return False
    return factor.dtype in (torch.bfloat16, torch.float16)
