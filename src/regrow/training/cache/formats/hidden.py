"""The teacher's last hidden state: its head, read from its checkpoint, gives the distribution.

In bfloat16 it equals the output of a teacher in bfloat16, bit for bit. In int8 each
token has a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from regrow.training.head import Head


@dataclass(frozen=True)
class Format:
    """2 H bytes a token, or H + 4."""

    STATES: ClassVar[bool] = True
    hidden_size: int
    dtype: Literal["bfloat16", "int8"] = "bfloat16"

    def check(self) -> None:
        """Nothing to refuse."""

    def bytes_per_token(self) -> float:
        """Two bytes a channel, or one and a float32 scale."""
        return 2 * self.hidden_size if self.dtype == "bfloat16" else self.hidden_size + 4

    def encode(self, hidden_NH: Tensor, head: Head, key: bytes) -> dict[str, Tensor]:
        """`hidden` [N, H], and for int8 `scale` [N]: the largest magnitude ÷ 127."""
        if self.dtype == "bfloat16":
            return {"hidden": hidden_NH.bfloat16().cpu()}
        wide_NH = hidden_NH.float()
        scale_N = wide_NH.abs().amax(-1).clamp_min(1e-30) / 127
        codes_NH = (wide_NH / scale_N[:, None]).round().to(torch.int8)
        return {"hidden": codes_NH.cpu(), "scale": scale_N.cpu()}

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        """States [N, H] in bfloat16."""
        if self.dtype == "bfloat16":
            return stored["hidden"]
        return (stored["hidden"].float() * stored["scale"][:, None]).bfloat16()
