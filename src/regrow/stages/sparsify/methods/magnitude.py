"""Magnitude: the smallest weights of each matrix become zero. The baseline, which needs no text."""

from __future__ import annotations

from torch import Generator, Tensor

from regrow.sparsity.pattern import Sparsity

NEEDS_GRAM = False


def sparsify(
    weight_RC: Tensor,
    sparsity: Sparsity,
    gram_CC: Tensor | None = None,
    damping: float = 0.0,
    draw: Generator | None = None,
) -> Tensor:
    """The weight [R, C] with zeros at its lowest |w|, of the whole matrix or of each group of M."""
    weight_RC = weight_RC.float()
    return weight_RC.masked_fill(sparsity.zeros(weight_RC.abs(), per_row=False), 0)
