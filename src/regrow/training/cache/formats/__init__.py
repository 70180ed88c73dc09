"""Formats of a teacher's stored outputs: each is one file, and its name is the format's name.

A file has a frozen dataclass `Format`. Its fields are written to the header of a cache. They come
from the stage's config; `vocab_size` and `hidden_size` come from the teacher.

- `STATES`: whether `decode` returns final hidden states [N, H]; otherwise it returns a `Sparse`.
- `check()`: raises UserError for invalid settings.
- `bytes_per_token()`: an upper bound of the size.
- `encode(hidden_NH, head, key)`: named tensors on the CPU for one sequence, whose key is `key`; the
  store concatenates those of all sequences along the first axis.
- `decode(stored)`: the inverse of `encode`, except for the information that the format discards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar, Protocol

from torch import Tensor

from regrow import plugins
from regrow.runtime.chunks import CHUNK_ELEMENTS
from regrow.training.cache.sparse import Sparse
from regrow.training.head import Head


class Format(Protocol):
    """The interface of each file's `Format`; see the package's docstring."""

    STATES: ClassVar[bool]

    def check(self) -> None:
        """Raise UserError for invalid settings."""

    def bytes_per_token(self) -> float:
        """An upper bound of the bytes per scored token."""

    def encode(self, hidden_NH: Tensor, head: Head, key: bytes) -> dict[str, Tensor]:
        """The tensors to store for one sequence's scored tokens."""

    def decode(self, stored: dict[str, Tensor]) -> Tensor | Sparse:
        """Hidden states or probabilities from the tensors that `encode` returned."""


def make(name: str, values: dict[str, Any]) -> Format:
    """Create the format `name` with its settings from `values`, and check them."""
    kind = plugins.load(__name__, name).Format
    form: Format = kind(**{field.name: values[field.name] for field in fields(kind)})
    form.check()
    return form


def log_probabilities(hidden_NH: Tensor, head: Head, vocab_size: int) -> Iterator[Tensor]:
    """Yield log-softmax [n, V] over the first `vocab_size` ids in float32, n tokens at a time."""
    weight_VH = head.weight_VH[:vocab_size].to(hidden_NH.dtype)
    for part in hidden_NH.split(max(16, CHUNK_ELEMENTS // vocab_size)):
        yield head.logits(part, weight_VH).log_softmax(-1)
