"""Blocks of exactly T tokens.  Shapes: n blocks, T = sequence length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100
"""The label of a token that is not scored."""
VALIDATE_EVERY = 8
"""Of calibration blocks that something is fitted on, every 8th is held out to choose it by."""


def held_out(number: int) -> bool:
    """Whether a calibration block, by its number, is held out from what is fitted on the others."""
    return number % VALIDATE_EVERY == VALIDATE_EVERY - 1


class Blocks(Dataset[dict[str, Tensor]]):
    """Packed token blocks: input_ids, position_ids, labels int64 [n, T] and real bool [n, T].

    Positions start over at 0 with each document and with each block. labels[t] is input_ids[t], or
    -100 where that token is not scored, which a document's first token in a block never is: like
    Hugging Face models expect, not shifted. `real` is False on padding. `source`, int64 [n, T], is
    the number of each token's source where sources have losses of their own, else None.
    """

    def __init__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        real: Tensor,
        source: Tensor | None = None,
    ) -> None:
        assert input_ids.shape == position_ids.shape == labels.shape == real.shape
        assert source is None or source.shape == input_ids.shape
        self.input_ids, self.position_ids = input_ids, position_ids
        self.labels, self.real, self.source = labels, real, source

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self._tensors().items()}

    @property
    def num_documents(self) -> int:
        """Documents as a model sees them: one that goes on in the next block counts again there."""
        return int(((self.position_ids == 0) & self.real).sum())

    @property
    def scored_tokens(self) -> int:
        """How many labels are not -100."""
        return int((self.labels != IGNORED).sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256, as hex, of the tensors and their shape."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        for tensor in self._tensors().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """The blocks in order, `batch_size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield {name: tensor[rows] for name, tensor in self._tensors().items()}

    def select(self, indices: Sequence[int]) -> Blocks:
        """The blocks at these indices."""
        rows = torch.tensor(list(indices), dtype=torch.int64)
        return Blocks(**{name: tensor[rows] for name, tensor in self._tensors().items()})

    def save(self, path: Path) -> None:
        """Write the tensors to a safetensors file, ids as int32."""
        narrow = {
            name: tensor if tensor.dtype == torch.bool else tensor.int()
            for name, tensor in self._tensors().items()
        }
        save_file({name: tensor.contiguous() for name, tensor in narrow.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Blocks:
        """The blocks that `save` wrote."""
        found = load_file(path)
        return cls(**{n: t if t.dtype == torch.bool else t.long() for n, t in found.items()})

    def _tensors(self) -> dict[str, Tensor]:
        found = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "labels": self.labels,
            "real": self.real,
        }
        return found if self.source is None else {**found, "source": self.source}
