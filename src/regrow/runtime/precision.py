"""Data types: that of a device's products, at least float32 for sums, the widest of a device."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from regrow.errors import UserError

PRECISION = "REGROW_PRECISION"
"""Environment variable: the data type of products, bfloat16 or float32."""
CHOICES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def half(device: torch.device) -> torch.dtype:
    """The data type in which models of half precision compute on a device.

    It is bfloat16, or float32 where products in bfloat16 are emulated: on GPUs before Ampere, and
    on CPUs without AVX-512 or Arm's bf16 instructions, where they take five times as long as in
    float32. Raises UserError if REGROW_PRECISION has no known value.
    """
    given = os.environ.get(PRECISION) or "auto"
    if given in CHOICES:
        return CHOICES[given]
    if given != "auto":
        raise UserError(f"{PRECISION}={given}: give bfloat16 or float32, or unset it")
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and bool(
            torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    return True


def autocast(device: torch.device) -> torch.autocast:
    """A context in which a model with float32 weights computes in `half` precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half(device) == torch.bfloat16)


def name_of(dtype: torch.dtype) -> str:
    """bf16, or the data type's own name."""
    return "bf16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")


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
