"""Stores a weight as its values that are not zero and a bit for each place: `sparse-bitmask`.

The layout is that of compressed-tensors up to 0.14. For a weight NAME [R, C], NAME.compressed has
the values in the order of the rows, NAME.bitmask [R, ⌈C/8⌉] a bit for each column (lowest bit
first), NAME.row_offsets [R] the number of values before each row, and NAME.shape the numbers R, C.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "sparse-bitmask"
PARTS = ("bitmask", "compressed", "row_offsets", "shape")
"""What stands behind the dot in the names of the stored tensors."""


def stored_bytes(shape: tuple[int, ...], values: int, itemsize: int) -> int:
    """Bytes of a weight of this shape with so many `values` that are not zero."""
    rows, columns = shape
    return values * itemsize + rows * math.ceil(columns / 8) + 8 * rows + 16


def pack(weight_RC: Tensor) -> dict[str, Tensor]:
    """The tensors to store, by the last part of their names."""
    import numpy
    import torch

    present_RC = weight_RC.cpu() != 0
    bits = numpy.packbits(present_RC.numpy(), axis=1, bitorder="little")
    counts_R = present_RC.sum(1)
    return {
        "bitmask": torch.from_numpy(bits),
        "compressed": weight_RC.cpu()[present_RC],
        "row_offsets": counts_R.cumsum(0) - counts_R,
        "shape": torch.tensor(weight_RC.shape),
    }


def unpack(stored: dict[str, Tensor]) -> Tensor:
    """The weight [R, C] whose `pack` is `stored`: the same bits, except that −0.0 becomes 0.0."""
    import numpy
    import torch

    rows, columns = stored["shape"].tolist()
    bits = numpy.unpackbits(stored["bitmask"].numpy(), axis=1, count=columns, bitorder="little")
    weight_RC = torch.zeros(rows, columns, dtype=stored["compressed"].dtype)
    weight_RC[torch.from_numpy(bits).bool()] = stored["compressed"]
    return weight_RC
