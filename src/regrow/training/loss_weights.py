"""Which output losses a student learns from, and how much each counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from regrow import plugins

Loss = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LossWeights:
    """A weighted sum of losses at one temperature; `weights` are by the loss's file name.

    A loss of weight 0 is measured and teaches nothing.
    """

    weights: dict[str, float]
    temperature: float = 1.0
    beta: float = 0.5
    """Share of the teacher in the mixture of `jsd`."""
    skew: float = 0.1
    """α of the skewed divergences."""
    exact: bool = False
    """Whether products of half-precision factors are made as exact as those of float32 ones."""
    by_source: tuple[dict[str, float], ...] = ()
    """Weights in place of `weights` for tokens of which the source is known, by its number."""

    @property
    def mixes(self) -> tuple[LossWeights, ...]:
        """The mix of tokens of no known source, then that of each source."""
        each = (self.weights, *self.by_source)
        return tuple(replace(self, weights=weights, by_source=()) for weights in each)

    def counts(self, source_N: Tensor) -> dict[str, Tensor]:
        """How many of the tokens each loss is taken of, by name."""
        tokens = [(source_N == number).sum() for number in range(len(self.by_source))]
        names = {name: None for weights in self.by_source for name in weights}
        taken = {
            n: [t for t, w in zip(tokens, self.by_source, strict=True) if n in w] for n in names
        }
        return {name: torch.stack(found).sum() for name, found in taken.items()}

    def terms(self) -> list[tuple[str, float, Loss, bool]]:
        """(name, weight, function, whether it needs the teacher) of each loss in use."""
        found: list[tuple[str, float, Loss, bool]] = []
        for name, weight in self.weights.items():
            module = plugins.load("regrow.training.losses", name)
            options = {option: vars(self)[option] for option in module.OPTIONS}
            found.append((name, weight, partial(module.loss, **options), module.NEEDS_TEACHER))
        return found

    def measuring(self, name: str) -> LossWeights:
        """The mix at temperature 1, in which the loss `name` is measured too, and comes first."""
        each = tuple({name: 0.0, **weights} for weights in self.by_source)
        return replace(self, weights={name: 0.0, **self.weights}, temperature=1.0, by_source=each)

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss of the mix reads the teacher's logits."""
        return any(needs for mix in self.mixes for *_, needs in mix.terms())
