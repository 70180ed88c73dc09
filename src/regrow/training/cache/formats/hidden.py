"""Stores the teacher's last hidden state; the head in its checkpoint computes the distribution.

In bfloat16 the state equals that of a live bfloat16 teacher, bit for bit. In int8 each token has a
scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from regrow.training.head import Head


@dataclass(frozen=True)
class Format:
    """Stores 2 H bytes per token in bfloat16, or H + 4 in int8."""

    STATES: ClassVar[bool] = True
    hidden_size: int
    dtype: Literal["bfloat16", "int8"] = "bfloat16"

    def check(self) -> None:
        """Do nothing: all settings are valid."""

    def bytes_per_token(self) -> float:
        """Two bytes per channel, or one byte per channel and a float32 scale."""
        return 2 * self.hidden_size if self.dtype == "bfloat16" else self.hidden_size + 4

    def encode(self, hidden_NH: Tensor, head: Head, key: bytes) -> dict[str, Tensor]:
        """Return `hidden` [N, H], and for int8 `scale` [N]: the largest magnitude ÷ 127."""
        if self.dtype == "bfloat16":
            return {"hidden": hidden_NH.bfloat16().cpu()}
        wide_NH = hidden_NH.float()
        scale_N = wide_NH.abs().amax(-1).clamp_min(1e-30) / 127
        codes_NH = (wide_NH / scale_N[:, None]).round().to(torch.int8)
        return {"hidden": codes_NH.cpu(), "scale": scale_N.cpu()}

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        """Return the states [N, H] in bfloat16."""
        if self.dtype == "bfloat16":
            return stored["hidden"]
        return (stored["hidden"].float() * stored["scale"][:, None]).bfloat16()
