"""The dtypes of sums: float32 at least, and the widest one of a device."""

from __future__ import annotations

import torch
from torch import Tensor


def float32_at_least(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums of values in `dtype`: float32, or float64 where `dtype` is that."""
    return torch.promote_types(torch.float32, dtype)


def widen(x: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return x.to(float32_at_least(x.dtype))


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none (mps)."""
    return torch.float32 if device.type == "mps" else torch.float64
