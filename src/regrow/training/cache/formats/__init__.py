"""Ways to store what a teacher says, one file each, named by the file.

A file has a frozen dataclass `Format`. Its fields are what the header of a cache says about it:
they come from the stage's config, `vocab_size` and `hidden_size` from the teacher.

- `STATES`: whether `decode` gives final hidden states [N, H]; else it gives a `Sparse`.
- `check()`: raises UserError for settings that cannot be.
- `bytes_per_token()`: an estimate, at most.
- `encode(hidden_NH, head, key)`: named tensors on the CPU, to be stored one block after the other
  along their first axis; `key` is the block's.
- `decode(stored)`: back from those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar, Protocol

from torch import Tensor

from regrow import plugins
from regrow.training.cache.sparse import Sparse
from regrow.training.head import CHUNK_ELEMENTS, Head


class Format(Protocol):
    """What each file's `Format` is; see the package's docstring."""

    STATES: ClassVar[bool]

    def check(self) -> None:
        """Raise UserError for settings that cannot be."""

    def bytes_per_token(self) -> float:
        """Bytes that a scored token takes, at most."""

    def encode(self, hidden_NH: Tensor, head: Head, key: bytes) -> dict[str, Tensor]:
        """What is stored of one block's scored tokens."""

    def decode(self, stored: dict[str, Tensor]) -> Tensor | Sparse:
        """What `encode` was given, as far as it was stored."""


def make(name: str, values: dict[str, Any]) -> Format:
    """The format `name` with those of `values` that are its settings, checked."""
    kind = plugins.load(__name__, name).Format
    made: Format = kind(**{field.name: values[field.name] for field in fields(kind)})
    made.check()
    return made


def log_probabilities(hidden_NH: Tensor, head: Head, vocab_size: int) -> Iterator[Tensor]:
    """log-softmax [n, V] over the first `vocab_size` ids in float32, some tokens at a time."""
    weight_VH = head.weight_VH[:vocab_size].to(hidden_NH.dtype)
    for part in hidden_NH.split(max(16, CHUNK_ELEMENTS // vocab_size)):
        yield head.logits(part, weight_VH).log_softmax(-1)
