"""Several teachers as one: the student learns a mixture of their distributions.

Shapes: N scored tokens, H hidden channels of all teachers together, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regrow.training.head import Head
from regrow.training.mix import Mix
from regrow.training.teacher import States, Teacher


@dataclass(frozen=True)
class Blend:
    """The heads of several teachers, read as one; `shares` sum to 1."""

    heads: tuple[Head, ...]
    shares: tuple[float, ...]

    @property
    def rows(self) -> int:
        """How many leading ids all of them have."""
        return min(head.rows for head in self.heads)

    def to(self, dtype: torch.dtype) -> Blend:
        """The same with weights of a dtype."""
        return Blend(tuple(head.to(dtype) for head in self.heads), self.shares)

    def target(self, hidden_NH: Tensor, rows: int, mix: Mix) -> Tensor:
        """Logits [N, V] whose softmax over T is Σ wᵢ pᵢ, each pᵢ the softmax of logits over T.

        `hidden_NH` has the teachers' states side by side. T · log Σ wᵢ pᵢ, in log space throughout.
        """
        widths = [head.weight_VH.shape[1] for head in self.heads]
        total_NV: Tensor | None = None
        for head, share, own_NH in zip(
            self.heads, self.shares, hidden_NH.split(widths, -1), strict=True
        ):
            logits_NV = head.target(own_NH.contiguous(), rows, mix) / mix.temperature
            log_p_NV = logits_NV.log_softmax(-1).add_(math.log(share))
            total_NV = log_p_NV if total_NV is None else torch.logaddexp(total_NV, log_p_NV)
        assert total_NV is not None, "a blend holds at least one teacher"
        return total_NV.mul_(mix.temperature)


class BlendedTeacher:
    """Stands in for a Teacher. All of them must have all of the student's tokens."""

    def __init__(self, teachers: Sequence[Teacher], shares: Sequence[float]) -> None:
        assert all(teacher.shared_S is None for teacher in teachers), "not the same ids compared"
        assert math.isclose(sum(shares), 1.0), f"the shares sum to {sum(shares)}"
        self.teachers, self.shares = tuple(teachers), tuple(shares)

    def hidden(self, batch: dict[str, Tensor], **reads: bool) -> States:
        """The final hidden states of all teachers, side by side."""
        assert not any(reads.values()), "a blend has no states of inner layers"
        found = [teacher.hidden(batch).final for teacher in self.teachers]
        return States(torch.cat([state.to(found[0].dtype) for state in found], -1), ())

    @cached_property
    def head(self) -> Blend:
        """The output heads."""
        return Blend(tuple(teacher.head for teacher in self.teachers), self.shares)

    def compared(self, head: Head, targets_N: Tensor) -> tuple[Head, Tensor]:
        """A student's head and targets as they are: all of its tokens are compared."""
        return head, targets_N
