"""Small whole numbers packed into as few bits as they need.  Shapes: N rows of K numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def bit_width(size: int) -> int:
    """Bits of a number below `size`: ceil(log2 size), at least 1."""
    return max(1, (size - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a packed row of `count` numbers."""
    return -(-count * bits // 8)


def pack(values_NK: Tensor, bits: int) -> Tensor:
    """Each row as one string of bits, highest first, filled up with zeros: uint8 [N, bytes]."""
    values = values_NK.cpu().numpy()
    assert values.size == 0 or (values.min() >= 0 and values.max() < 1 << bits), bits
    shifts = np.arange(bits - 1, -1, -1)
    digits = (values[..., None] >> shifts & 1).astype(np.uint8)
    return torch.from_numpy(np.packbits(digits.reshape(len(values), -1), axis=1))


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The `count` numbers of each row that `pack` packed: int64 [N, K]."""
    digits = np.unpackbits(packed.numpy(), axis=1, count=count * bits)
    values = np.zeros((len(packed), count), dtype=np.int64)
    for digit in np.moveaxis(digits.reshape(len(packed), count, bits), -1, 0):
        values = values << 1 | digit
    return torch.from_numpy(values)
