"""Rounds to nearest over the full range of each group: the baseline, which needs no text."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.quantization.formats import Scheme
from regrow.quantization.grid import Grid, fit

NEEDS_GRAM = False


def quantize(
    weight_RC: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    gram_CC: Tensor | None = None,
    damping: float = 0.0,
    held_RC: Tensor | None = None,
) -> tuple[Tensor, Grid]:
    """The weight rounded to the nearest values of its grid, float32 [R, C], and the grid.

    Zeros stay zero, because every grid has the value 0.
    """
    grid = fit(weight_RC, scheme, dtype)
    return grid.nearest(weight_RC), grid
