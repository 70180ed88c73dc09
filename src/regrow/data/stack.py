"""A growing stack of arrays that does not stay in memory if it becomes large."""

from __future__ import annotations

import tempfile
from math import prod
from typing import IO

import numpy as np
from numpy.typing import NDArray

IN_MEMORY = 256_000_000
"""Bytes of packed sequences that are kept in memory; longer ones go to a temporary file."""


class Stack:
    """Arrays of one shape, int32, which are stacked at the end.

    More than `IN_MEMORY` bytes are written to a file without a name in the folder for temporary
    files, and read through a memory map. The operating system may drop its pages at any time.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.count = shape, 0
        self.waiting: list[NDArray[np.int32]] = []
        self.file: IO[bytes] | None = None
        self.mapped: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return self.count

    def append(self, array: NDArray[np.int32]) -> None:
        """Add an array, which must not be changed afterwards."""
        self.waiting.append(array)
        self.count += 1
        if len(self.waiting) * 4 * prod(self.shape) > IN_MEMORY:
            self._write()

    def stacked(self, count: int) -> NDArray[np.int32]:
        """The first `count` arrays, or as many as there are: [n, *shape]. Ends the stack."""
        if self.file is not None:
            self._write()
            # Copy on write, because torch warns of arrays that cannot be written to.
            self.mapped = np.memmap(self.file, np.int32, mode="c", shape=(self.count, *self.shape))
            self.file.close()
            self.file = None
        if self.mapped is not None:
            return self.mapped[:count]
        waiting = self.waiting[:count]
        return np.stack(waiting) if waiting else np.empty((0, *self.shape), dtype=np.int32)

    def _write(self) -> None:
        if self.file is None:
            self.file = tempfile.TemporaryFile(prefix="regrow-")  # noqa: SIM115 it is mapped
        for array in self.waiting:
            self.file.write(np.ascontiguousarray(array).tobytes())
        self.file.flush()
        self.waiting = []
