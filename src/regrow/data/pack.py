"""Documents → blocks, one after the other.  Shapes: T = sequence length."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from regrow.data.blocks import IGNORED, Blocks
from regrow.data.documents import Document


class Packer:
    """Lays documents end to end into blocks of T tokens; what does not fit goes on in the next.

    There it is a document of its own (positions from 0, first token not scored), because blocks are
    shown to the model one by one and a token has nothing before its block to be predicted from.
    With `scored_only`, tokens from which nothing in their block is predicted (prompts longer than
    the room left, what follows the last answer) are left out. `tagged` blocks tell the source of
    each token.
    """

    def __init__(
        self, sequence_length: int, pad_id: int, scored_only: bool = False, tagged: bool = False
    ) -> None:
        self.sequence_length, self.pad_id = sequence_length, pad_id
        self.scored_only, self.tagged = scored_only, tagged
        self.documents = self.tokens = 0
        self.full: list[NDArray[np.int32]] = []  # each [3 or 4, T]: ids, positions, labels, source
        self.block = self._empty()
        self.used = 0

    def add(self, document: Document) -> None:
        """Append a document."""
        ids = np.array(document.ids, dtype=np.int32)
        labels = np.where(np.array(document.scored, dtype=bool), ids, IGNORED)
        self.documents += 1
        self.tokens += len(ids)
        start = self._begin(labels, 0)
        while start < len(ids):
            room = min(self.sequence_length - self.used, len(ids) - start)
            here, taken = slice(self.used, self.used + room), slice(start, start + room)
            self.block[0, here] = ids[taken]
            self.block[1, here] = np.arange(room)
            self.block[2, here] = labels[taken]
            self.block[2, self.used] = IGNORED
            self.block[3:, here] = document.source
            self.used, start = self.used + room, start + room
            if self.used == self.sequence_length:
                self.full.append(self.block)
                self.block, self.used = self._empty(), 0
            start = self._begin(labels, start)

    def blocks(self, num_blocks: int) -> Blocks:
        """The first `num_blocks` full blocks, or those there are; n may be 0.

        An incomplete last block is dropped unless it is the only one; then it is padded, the
        padding not scored and a document of its own.
        """
        full = self.full[:num_blocks]
        real = np.ones((len(full), self.sequence_length), dtype=bool)
        if not full and self.used:
            full = [self.block.copy()]
            full[0][1, self.used :] = np.arange(self.sequence_length - self.used)
            real = (np.arange(self.sequence_length) < self.used)[None]
        ids, positions, labels, *source = (
            _stacked([block[row] for block in full], real) for row in range(len(self.block))
        )
        return Blocks(ids, positions, labels, torch.from_numpy(real), *source)

    def _begin(self, labels: NDArray[np.int32], start: int) -> int:
        """Where the next piece begins: at `start`, or as far on as it takes to score something."""
        if not self.scored_only:
            return start
        room = self.sequence_length - self.used
        later = (labels[start + 1 :] != IGNORED).nonzero()[0]
        if not len(later):
            return len(labels)
        first = start + 1 + int(later[0])
        if first < start + room:
            return start
        # All that is left if it fits, else half of the room for what comes before the first.
        return max(start, min(len(labels) - room, first - room // 2))

    def _empty(self) -> NDArray[np.int32]:
        fill = [[self.pad_id], [0], [IGNORED], [0]][: 3 + self.tagged]
        return np.repeat(np.array(fill, dtype=np.int32), self.sequence_length, axis=1)


def _stacked(rows: list[NDArray[np.int32]], like: NDArray[np.bool_]) -> torch.Tensor:
    """int64 [n, T]; held as int32 until here, which halves the memory of a large build."""
    tensor = torch.empty(like.shape, dtype=torch.int64)
    for at, row in enumerate(rows):
        tensor[at] = torch.from_numpy(row)
    return tensor
