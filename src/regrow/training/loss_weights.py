"""The output losses that a student learns from, and their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from regrow import plugins

LOSSES = "regrow.training.losses"

LossFunction = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(student's logits [N, V], teacher's logits [N, V], targets [N], temperature) → value of each
token [N] and gradient [N, V] with respect to the student's logits."""


class Term(NamedTuple):
    """One loss of a weighted sum."""

    name: str
    weight: float
    loss: LossFunction
    needs_teacher: bool


@dataclass(frozen=True)
class LossWeights:
    """A weighted sum of losses at one temperature; the keys of `weights` are file names of losses.

    A loss of weight 0 is measured but not learned from.
    """

    weights: dict[str, float]
    temperature: float = 1.0
    beta: float = 0.5
    """β: the share of the teacher in the mixture of `jsd`."""
    skew: float = 0.1
    """α of the skewed divergences."""
    exact: bool = False
    """Whether products of half-precision factors are as exact as those of float32 factors."""
    by_source: tuple[dict[str, float], ...] = ()
    """Weights that replace `weights` for the tokens of each source, by the source's number."""

    @property
    def groups(self) -> tuple[LossWeights, ...]:
        """The weights for tokens without a known source, then those for each source's tokens."""
        each = (self.weights, *self.by_source)
        return tuple(replace(self, weights=weights, by_source=()) for weights in each)

    def counts(self, source_N: Tensor) -> dict[str, Tensor]:
        """The number of tokens that each loss applies to, by the loss's name."""
        tokens = [(source_N == number).sum() for number in range(len(self.by_source))]
        counts: dict[str, Tensor] = {}
        for count, weights in zip(tokens, self.by_source, strict=True):
            for name in weights:
                counts[name] = counts[name] + count if name in counts else count
        return counts

    def terms(self) -> list[Term]:
        """The losses in use, ready to be called."""
        terms = []
        for name, weight in self.weights.items():
            module = plugins.load(LOSSES, name)
            options = {option: vars(self)[option] for option in module.OPTIONS}
            loss = partial(with_gradient(module), **options)
            terms.append(Term(name, weight, loss, module.NEEDS_TEACHER))
        return terms

    def validation(self, *names: str) -> LossWeights:
        """These losses, with `names` added as the first ones, for measurements on held-out text.

        The temperature is 1, and products are exact: in bfloat16 a KL of 3e-5 would become 2e-4.
        """
        first = dict.fromkeys(names, 0.0)
        by_source = tuple({**first, **weights} for weights in self.by_source)
        weights = {**first, **self.weights}
        return replace(self, weights=weights, temperature=1.0, exact=True, by_source=by_source)

    @property
    def needs_teacher(self) -> bool:
        """Whether any of the losses reads the teacher's logits."""
        return any(term.needs_teacher for group in self.groups for term in group.terms())


def with_gradient(module: ModuleType) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function that returns values and gradient: the loss file's own, or made by autograd."""
    if hasattr(module, "loss_and_gradient"):
        written: Callable[..., tuple[Tensor, Tensor]] = module.loss_and_gradient
        return written
    return partial(_differentiate, module)


def _differentiate(
    module: ModuleType,
    student_NV: Tensor,
    teacher_NV: Tensor,
    targets_N: Tensor,
    temperature: float,
    **options: float,
) -> tuple[Tensor, Tensor]:
    """The values and the gradient of a loss that is only a formula, by autograd on one chunk."""
    student_NV = student_NV.detach().requires_grad_()
    with torch.enable_grad():
        value_N: Tensor = module.loss(student_NV, teacher_NV, targets_N, temperature, **options)
        if value_N.shape != targets_N.shape:
            raise ValueError(
                f"{module.__name__}: loss returned the shape {list(value_N.shape)}; it must return "
                f"one value for each of the {len(targets_N)} tokens"
            )
        (gradient_NV,) = torch.autograd.grad(value_N.sum(), student_NV)
    return value_N.detach(), gradient_NV.contiguous()  # a broadcast gradient cannot be scaled
