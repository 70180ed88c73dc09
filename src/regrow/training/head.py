"""lm_head and loss in chunks over the scored tokens; [batch, time, vocabulary] is never made.

Shapes: N scored tokens, H hidden, V vocabulary; `student_NH` is a tensor of that shape.
The gradients are computed in the forward pass: factors of matrix products in the compute dtype
(`products.py`), softmax and accumulation in float32. The gradient by the logits is made chunk by
chunk and multiplied for many chunks at once, since each product for the head's weights reads and
writes a float32 [V, H].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regrow.errors import UserError
from regrow.runtime.precision import float32_at_least
from regrow.training.cache.sparse import Sparse
from regrow.training.loss_weights import LossWeights
from regrow.training.products import add_product, product, split

CHUNK_ELEMENTS = 1 << 24  # logits of a chunk: 64 MB in float32
CHUNKS_TOGETHER = 4  # whose gradients by the logits, in the compute dtype, are multiplied at once


@dataclass(frozen=True)
class Head:
    """An output projection: weight [V, H] and the cap of Gemma's logit soft-capping, if any."""

    weight_VH: Tensor
    softcap: float | None = None

    def logits(self, hidden_NH: Tensor, weight_VH: Tensor, exact: bool = False) -> Tensor:
        """Logits [N, V] of final hidden states, float32 at least; `weight_VH` as wide as those.

        Off CUDA those of half precision are rounded to it, unless `exact`.
        """
        logits_NV = product(hidden_NH, weight_VH.T, exact)
        if self.softcap is not None:
            logits_NV = logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def through_cap(self, gradient_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """Gradient by the raw logits, from the gradient by the capped ones."""
        if self.softcap is None:
            return gradient_NV
        return gradient_NV * (1 - (logits_NV / self.softcap) ** 2)

    @property
    def rows(self) -> int:
        """How many ids its logits are of."""
        return len(self.weight_VH)

    def to(self, dtype: torch.dtype) -> Head:
        """The same with weights of a dtype."""
        return replace(self, weight_VH=self.weight_VH.to(dtype))

    def target(self, hidden_NH: Tensor, rows: int, mix: LossWeights) -> Tensor:
        """Logits [N, rows] that a student learns from."""
        return self.logits(hidden_NH, self.weight_VH[:rows], mix.exact)


class TeacherTarget(Protocol):
    """What gives a teacher's logits: a Head, or several of them (`blend.py`)."""

    @property
    def rows(self) -> int:
        """How many ids its logits are of."""

    def to(self, dtype: torch.dtype) -> TeacherTarget:
        """The same with weights of a dtype."""

    def target(self, hidden_NH: Tensor, rows: int, mix: LossWeights) -> Tensor:
        """Logits [N, rows] that a student learns from."""


def head_of(model: Any) -> Head:
    """The output head of a stock causal language model; UserError for one we cannot reproduce."""
    config = model.config
    refuse_scaled(config.to_dict(), config.model_type)
    output = model.get_output_embeddings()
    if output.bias is not None:
        raise UserError(f"{config.model_type} has a bias in its output head: not supported")
    return Head(output.weight, getattr(config, "final_logit_softcapping", None))


def refuse_scaled(config: dict[str, Any], model_type: str) -> None:
    """Raise UserError for a model that scales its logits."""
    for key in ("logit_scale", "logits_scaling"):
        if config.get(key) not in (None, 1, 1.0):
            raise UserError(f"{model_type} scales its logits ({key}): not supported")


def head_loss(
    student_NH: Tensor,
    student: Head,
    targets_N: Tensor,
    mix: LossWeights,
    teacher_NH: Tensor | None = None,
    teacher: TeacherTarget | None = None,
    chunk_tokens: int | None = None,
    sparse: Sparse | None = None,
    source_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the mixed loss over N tokens, differentiable by `student_NH` and the student's head.

    Also returns the plain sum of each loss by name, in nats. Vocabularies of different (padded)
    size are compared on the ids both have. N may be 0: then the sum is a zero with a graph.
    With `sparse` the forward KL is taken against what a cache holds of the teacher. With `source_N`
    each token has the losses of its source, `mix.by_source`, and no others.
    """
    compute = torch.get_autocast_dtype(student_NH.device.type)
    if not torch.is_autocast_enabled(student_NH.device.type):
        compute = student_NH.dtype
    chunk = chunk_tokens or max(16, CHUNK_ELEMENTS // student.weight_VH.shape[0])
    mixes = (mix,) if source_N is None else mix.mixes[1:]
    job = _ChunkedLoss(student, teacher, mixes, compute, chunk, sparse, source_N)
    weight_VH = student.weight_VH
    if not torch.is_grad_enabled():  # a Function is told to give gradients even then
        student_NH, weight_VH = student_NH.detach(), weight_VH.detach()
    total, *parts = _HeadLoss.apply(student_NH, weight_VH, targets_N, teacher_NH, job)
    found: dict[str, Tensor] = {}
    for name, part in zip((name for each in mixes for name in each.weights), parts, strict=True):
        found[name] = found[name] + part if name in found else part
    return total, found


@dataclass(frozen=True)
class _ChunkedLoss:
    student: Head
    teacher: TeacherTarget | None
    mixes: tuple[LossWeights, ...]
    """One for all tokens or, with `source_N`, one for those of each source."""
    compute: torch.dtype
    chunk: int
    sparse: Sparse | None
    source_N: Tensor | None

    @property
    def exact(self) -> bool:
        return self.mixes[0].exact

    @property
    def together(self) -> int:
        """Tokens of the chunks that are multiplied at once."""
        return self.chunk * CHUNKS_TOGETHER


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        teacher_NH: Tensor | None,
        job: _ChunkedLoss,
    ) -> tuple[Tensor, ...]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        sums = _Sums(student_NH, weight_VH, job, wants_hidden, wants_weight)
        with torch.autocast(student_NH.device.type, enabled=False):
            for begin in range(0, len(targets_N), job.together):
                end = min(begin + job.together, len(targets_N))
                sums.add(slice(begin, end), targets_N, teacher_NH)
        ctx.gradients = (sums.hidden_gradient, sums.weight_gradient)
        values = sums.values.to(float32_at_least(student_NH.dtype))
        weights = values.new_tensor([w for mix in job.mixes for w in mix.weights.values()])
        parts = [part.clone() for part in values]
        ctx.mark_non_differentiable(*parts)
        # No product: autocast would round the sum to half precision.
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
    """The running sums of values and gradients over the chunks."""

    def __init__(
        self,
        student_NH: Tensor,
        weight_VH: Tensor,
        job: _ChunkedLoss,
        wants_hidden: bool,
        wants_weight: bool,
    ) -> None:
        self.job, self.student_NH = job, student_NH
        self.weight_VH = weight_VH.detach().to(job.compute)
        self.teacher = None if job.teacher is None else job.teacher.to(job.compute)
        self.shared = len(self.weight_VH)
        if self.teacher is not None:
            self.shared = min(self.shared, self.teacher.rows)
        if job.sparse is not None:
            self.shared = min(self.shared, job.sparse.vocab_size)
        self.terms = [mix.terms() for mix in job.mixes]
        count = sum(map(len, self.terms))
        self.values = torch.zeros(count, dtype=torch.float64, device=student_NH.device)
        self.hidden_gradient = torch.empty_like(student_NH) if wants_hidden else None
        self.weight_gradient = (
            torch.zeros_like(weight_VH, dtype=float32_at_least(student_NH.dtype))
            if wants_weight
            else None
        )
        self.slopes: tuple[Tensor, ...] = ()
        """What is multiplied next: gradients by the logits, as `split` gives them."""

    def add(self, part: slice, targets_N: Tensor, teacher_NH: Tensor | None) -> None:
        """Add values and gradients of the tokens in `part`, one chunk or more."""
        hidden_NH = self.student_NH[part].detach().to(self.job.compute)
        weight_VH = self.weight_VH[: self.shared]
        for begin in range(part.start, part.stop, self.job.chunk):
            chunk = slice(begin, min(begin + self.job.chunk, part.stop))
            place = slice(chunk.start - part.start, chunk.stop - part.start)
            logits_NV = self.job.student.logits(hidden_NH[place], weight_VH, self.job.exact)
            gradient_NV = self._gradient(chunk, logits_NV, targets_N, teacher_NH)
            if self.hidden_gradient is not None or self.weight_gradient is not None:
                self._keep(place, self.job.student.through_cap(gradient_NV, logits_NV))
        slopes_NV = tuple(kept_NV[: len(hidden_NH)] for kept_NV in self.slopes)
        if self.hidden_gradient is not None:
            sum_NH = torch.zeros_like(hidden_NH, dtype=float32_at_least(hidden_NH.dtype))
            add_product(sum_NH, slopes_NV, weight_VH)
            self.hidden_gradient[part] = sum_NH.to(self.hidden_gradient.dtype)
        if self.weight_gradient is not None:
            slopes_VN = tuple(slope_NV.T for slope_NV in slopes_NV)
            add_product(self.weight_gradient[: self.shared], slopes_VN, hidden_NH)

    def _keep(self, place: slice, gradient_NV: Tensor) -> None:
        """Put a chunk's gradient by the logits at its place in the slopes."""
        parts_NV = split(gradient_NV, self.job.compute, self.job.exact)
        if not self.slopes:
            size = (min(self.job.together, len(self.student_NH)), self.shared)
            self.slopes = tuple(part_NV.new_empty(size) for part_NV in parts_NV)
        for slope_NV, part_NV in zip(self.slopes, parts_NV, strict=True):
            slope_NV[place] = part_NV

    def _gradient(
        self, part: slice, logits_NV: Tensor, targets_N: Tensor, teacher_NH: Tensor | None
    ) -> Tensor:
        """Gradient of the mix by the student's logits; adds each loss's value on the way."""
        teacher_NV = logits_NV
        sparse = None if self.job.sparse is None else self.job.sparse[part]
        if self.teacher is not None and teacher_NH is not None:
            hidden_NH = teacher_NH[part].to(self.job.compute)
            teacher_NV = self.teacher.target(hidden_NH, self.shared, self.job.mixes[0])
        if self.job.source_N is None:
            keep = self.job.student.softcap is not None
            return self._mixed(0, logits_NV, teacher_NV, targets_N[part], sparse, keep)
        gradient_NV = torch.zeros_like(logits_NV)
        for number in range(len(self.terms)):
            rows = (self.job.source_N[part] == number).nonzero().squeeze(1)
            if len(rows):
                known = None if sparse is None else sparse[rows]
                given = (logits_NV[rows], teacher_NV[rows], targets_N[part][rows], known)
                gradient_NV[rows] = self._mixed(number, *given)
        return gradient_NV

    def _mixed(
        self,
        number: int,
        logits_NV: Tensor,
        teacher_NV: Tensor,
        targets_N: Tensor,
        sparse: Sparse | None,
        keep: bool = False,
    ) -> Tensor:
        """Gradient of the mix of that number; overwrites the logits, unless to `keep` them."""
        # Losses may overwrite what they read: only the last one gets the originals.
        terms, temperature = self.terms[number], self.job.mixes[number].temperature
        first = sum(map(len, self.terms[:number]))
        total: Tensor | None = None
        for place, (_, weight, loss, needs_teacher) in enumerate(terms):
            last = place == len(terms) - 1
            student_in = logits_NV if last and not keep else logits_NV.clone()
            teacher_in = teacher_NV if last else teacher_NV.clone()
            if sparse is not None and needs_teacher:
                value_N, gradient_NV = sparse.loss(student_in)
            else:
                value_N, gradient_NV = loss(student_in, teacher_in, targets_N, temperature)
            self.values[first + place] += value_N.sum(dtype=torch.float64)
            if weight != 1.0:
                gradient_NV = gradient_NV.mul_(weight)
            total = gradient_NV if total is None else total.add_(gradient_NV)
        assert total is not None, "a mix holds at least one loss"
        return total
