"""Data types for sums: at least float32, and the widest floating-point type of a device."""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(dtype: torch.dtype) -> float:
    """|error|² / |stream|² that rounding a stream to `dtype` makes; less is nothing to correct.

    Half a unit in the last place, squared; not less than 2⁻⁴⁰, which the sums of products make.
    """
    return max((torch.finfo(dtype).eps / 2) ** 2, 2.0**-40)


def float32_at_least(dtype: torch.dtype) -> torch.dtype:
    """Data type for sums of values in `dtype`: float64 for float64, otherwise float32."""
    return torch.promote_types(torch.float32, dtype)


def widen(x: Tensor) -> Tensor:
    """Convert a tensor to at least float32."""
    return x.to(float32_at_least(x.dtype))


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without float64 (mps)."""
    return torch.float32 if device.type == "mps" else torch.float64
