"""Packs blended and shuffled documents into sequences of exactly T tokens.

Shapes: n sequences, T = sequence length.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from regrow.data.blend import BuildContext, blend, embedding_rows
from regrow.data.config import DataConfig, Split
from regrow.data.documents import Document, prefix_ids
from regrow.data.stack import Stack
from regrow.errors import UserError
from regrow.runtime.progress import Progress, say

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint

IGNORED = -100
"""The label of a token that is not scored."""
VALIDATE_EVERY = 8
"""A fit on calibration sequences leaves out every 8th sequence, for validation."""
OPEN = 16
"""Sequences that may wait for a document that fits."""
PART_TOKENS = 1 << 18
"""Tokens that are read at once where a whole text is looked through."""


Subset = Literal["fit", "validate"]
"""The role of a calibration sequence: a parameter is fitted on it, or the fit is validated."""


def held_out(number: int) -> bool:
    """Whether the calibration sequence with this number is used to validate a fit."""
    return number % VALIDATE_EVERY == VALIDATE_EVERY - 1


class Sequences(Dataset[dict[str, Tensor]]):
    """Packed sequences: input_ids, position_ids, labels int64 [n, T] and real bool [n, T].

    Positions start again at 0 with each document and with each sequence. labels[t] is input_ids[t],
    or -100 if that token is not scored; as Hugging Face models expect, labels are not shifted. A
    document's first token in a sequence is never scored. `real` is False for padding. `source`,
    int64 [n, T], is the number of each token's source if a source has its own losses, else None.

    Tensors may be given as int32, and may be memory-mapped. They are then kept so, and each of the
    properties makes an int64 copy of all sequences: for long texts use `[]`, `batches` or `parts`.
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
        self._kept = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": labels,
            "real": real,
        }
        if source is not None:
            self._kept["source"] = source

    @property
    def input_ids(self) -> Tensor:
        """Ids of the tokens, int64 [n, T]."""
        return self._kept["input_ids"].long()

    @property
    def position_ids(self) -> Tensor:
        """Positions in the documents, int64 [n, T]."""
        return self._kept["position_ids"].long()

    @property
    def labels(self) -> Tensor:
        """Ids of the scored tokens, -100 for others, int64 [n, T]."""
        return self._kept["labels"].long()

    @property
    def real(self) -> Tensor:
        """False for padding, bool [n, T]."""
        return self._kept["real"]

    @property
    def source(self) -> Tensor | None:
        """Numbers of the sources, int64 [n, T], or None."""
        return self._kept["source"].long() if "source" in self._kept else None

    @property
    def length(self) -> int:
        """T, the number of tokens in a sequence."""
        return int(self._kept["input_ids"].shape[1])

    def __len__(self) -> int:
        return len(self._kept["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: _wide(tensor[index]) for name, tensor in self._kept.items()}

    @property
    def num_documents(self) -> int:
        """The number of documents; one that continues in the next sequence counts again."""
        return sum(int(((p["position_ids"] == 0) & p["real"]).sum()) for p in self.parts())

    @property
    def scored_tokens(self) -> int:
        """The number of labels that are not -100."""
        return sum(int((part["labels"] != IGNORED).sum()) for part in self.parts())

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the tensors and their shape, as hex."""
        digest = hashlib.sha256(repr((len(self), self.length)).encode())
        for name in self._kept:
            for part in self.parts(name):
                digest.update(part[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def ids_used(self) -> Tensor:
        """Every id that occurs in the sequences once, in ascending order, int64."""
        found = [part["input_ids"].unique() for part in self.parts("input_ids")]
        return torch.cat([torch.empty(0, dtype=torch.int64), *found]).unique()

    def parts(self, *names: str) -> Iterator[dict[str, Tensor]]:
        """Yield some of the tensors, or all, for a few thousand tokens at a time."""
        rows = max(1, PART_TOKENS // self.length)
        for start in range(0, len(self), rows):
            part = slice(start, start + rows)
            yield {name: _wide(self._kept[name][part]) for name in names or self._kept}

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the sequences in order, `batch_size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield {name: _wide(tensor[rows]) for name, tensor in self._kept.items()}

    def select(self, indices: Sequence[int]) -> Sequences:
        """The sequences at these indices."""
        rows = torch.tensor(list(indices), dtype=torch.int64)
        return Sequences(**{name: tensor[rows] for name, tensor in self._kept.items()})

    def save(self, path: Path) -> None:
        """Write the tensors to a safetensors file, ids as int32."""
        narrow = {
            name: tensor if tensor.dtype == torch.bool else tensor.int()
            for name, tensor in self._kept.items()
        }
        save_file({name: tensor.contiguous() for name, tensor in narrow.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Sequences:
        """Read the sequences that `save` wrote."""
        return cls(**load_file(path))


def _wide(tensor: Tensor) -> Tensor:
    """A tensor as models read it; `real` may be a view that repeats one value."""
    return tensor.contiguous() if tensor.dtype == torch.bool else tensor.long()


def joined(parts: Sequence[Sequences]) -> Sequences:
    """The sequences of all parts, one after the other; all parts have the same tensors."""
    tensors = [part._kept for part in parts]
    return Sequences(**{name: torch.cat([each[name] for each in tensors]) for name in tensors[0]})


def fit_and_validate(
    sequences: Sequences, count: int, batch_size: int
) -> Iterator[tuple[Subset | None, dict[str, Tensor]]]:
    """Yield batches of one subset each: the first `count` sequences, then the others (None).

    A batch has input_ids, position_ids, labels and real, all [B, T].
    """
    subsets: dict[Subset | None, list[int]] = {"fit": [], "validate": [], None: []}
    for number in range(len(sequences)):
        subset: Subset = "validate" if held_out(number) else "fit"
        subsets[subset if number < count else None].append(number)
    for name, numbers in subsets.items():
        for batch in sequences.select(numbers).batches(batch_size):
            batch.pop("source", None)
            yield name, batch


class _Open:
    """A sequence with room left: int32 [3 or 4, T] with ids, positions, labels and the source."""

    def __init__(self, length: int, pad_id: int, tagged: bool) -> None:
        fill = [[pad_id], [0], [IGNORED], [0]][: 3 + tagged]
        self.rows = np.repeat(np.array(fill, dtype=np.int32), length, axis=1)
        self.used = 0
        self.keeps_whole = False

    @property
    def room(self) -> int:
        """The number of tokens that still fit."""
        return self.rows.shape[1] - self.used

    def append(
        self, ids: NDArray[np.int32], labels: NDArray[np.int32], source: int, first: int = 0
    ) -> None:
        """Append a document, or a part of one; the token at index `first` is not scored."""
        span = slice(self.used, self.used + len(ids))
        self.rows[:3, span] = ids, np.arange(len(ids)), labels
        self.rows[2, self.used + first] = IGNORED
        self.rows[3:, span] = source
        self.used = span.stop

    def padded(self, separate: bool) -> NDArray[np.int32]:
        """The rows; padding is a separate document, or continues the positions of the last one."""
        first = 0 if separate else self.rows[1, self.used - 1] + 1
        self.rows[1, self.used :] = first + np.arange(self.room)
        return self.rows


class Packer:
    """Packs documents into sequences of exactly T tokens.

    A document with tokens that are not scored, such as a prompt and its answer, stays whole if it
    has at most T tokens. It goes to the fullest of the open sequences that have room for it (best
    fit). At most `OPEN` sequences are open; the fullest is then padded.

    Other documents, such as plain text, go to the fullest open sequence. What does not fit
    continues in the next sequence as a separate document: it begins with the `prefix` (the tokens,
    such as BOS, that the tokenizer puts before any text), and its positions start at 0. Its first
    token after the prefix is not scored, because the model does not see the text before it.

    With `scored_only`, tokens after which no token of their sequence is scored are left out: the
    beginning of a prompt that is longer than the room left, and all tokens after the last answer.
    With `tagged`, the sequences have a `source`. With `alone`, a sequence has one document, or a
    part of one, and padding after it.
    """

    def __init__(
        self,
        sequence_length: int,
        pad_id: int,
        scored_only: bool = False,
        tagged: bool = False,
        prefix: Sequence[int] = (),
        alone: bool = False,
    ) -> None:
        assert len(prefix) + 2 <= sequence_length, "no room for a token that is predicted"
        self.sequence_length, self.pad_id = sequence_length, pad_id
        self.scored_only, self.tagged, self.alone = scored_only, tagged, alone
        self.lengths: list[int] = []  # of the full sequences, without padding
        self.prefix = np.array(prefix, dtype=np.int32)
        self.documents = self.tokens = 0
        self.open: list[_Open] = []
        self.full = Stack((3 + tagged, sequence_length))

    def add(self, document: Document) -> None:
        """Add a document, whose first tokens are the prefix."""
        ids = np.array(document.ids, dtype=np.int32)
        labels = np.where(np.array(document.scored, dtype=bool), ids, IGNORED)
        self.documents += 1
        self.tokens += len(ids)
        if self.scored_only:
            scored = (labels[1:] != IGNORED).nonzero()[0]
            end = scored[-1] + 2 if len(scored) else 0
            ids, labels = ids[:end], labels[:end]
        prompted = bool((labels[len(self.prefix) :] == IGNORED).any())
        if prompted and len(ids) <= self.sequence_length:
            self._place_whole(ids, labels, document.source)
        else:
            start = self._begin(labels, 0)
            while start < len(ids):
                start = self._begin(labels, self._place(ids, labels, start, document.source))
        if self.alone and self.open:
            if bool((self.open[0].rows[2] != IGNORED).any()):
                self._finish(self.open[0])
            self.open = []

    def _place_whole(self, ids: NDArray[np.int32], labels: NDArray[np.int32], source: int) -> None:
        sequence = self._fullest(len(ids))
        sequence.append(ids, labels, source)
        sequence.keeps_whole = True
        if not sequence.room:
            self._finish(sequence)
        elif len(self.open) > OPEN:
            self._finish(self._fullest(1))

    def _place(
        self, ids: NDArray[np.int32], labels: NDArray[np.int32], start: int, source: int
    ) -> int:
        """Fill a sequence with the document from `start` on; returns the start of the rest."""
        prefix = self.prefix if start else self.prefix[:0]
        sequence = self._fullest(len(prefix) + 1)
        end = min(len(ids), start + sequence.room - len(prefix))
        unscored = np.full_like(prefix, IGNORED)
        sequence.append(
            np.concatenate([prefix, ids[start:end]]),
            np.concatenate([unscored, labels[start:end]]),
            source,
            len(prefix),
        )
        if not sequence.room:
            self._finish(sequence)
        # If only the prefix of a document fitted, the document begins in the next sequence.
        return 0 if end < len(ids) and end <= len(self.prefix) else end

    def _fullest(self, room: int) -> _Open:
        """The fullest open sequence with room for so many tokens, or a new one."""
        fitting = [sequence for sequence in self.open if sequence.room >= room]
        if fitting:
            return min(fitting, key=lambda sequence: sequence.room)
        self.open.append(_Open(self.sequence_length, self.pad_id, self.tagged))
        return self.open[-1]

    def sequences(self, num_sequences: int) -> Sequences:
        """The first `num_sequences` sequences, or as many as there are; n may be 0.

        After the full ones come those with documents that stay whole, padded. One with only plain
        text that is not full is dropped, unless it is the only one. Padding is not scored. Ends
        the packing.
        """
        for sequence in sorted(self.open, key=lambda sequence: sequence.room):
            if len(self.full) < num_sequences and (sequence.keeps_whole or not len(self.full)):
                self._finish(sequence)
        rows = self.full.stacked(num_sequences)
        lengths = np.array(self.lengths[:num_sequences], dtype=np.int64).reshape(-1, 1)
        if bool((lengths == self.sequence_length).all()):  # a view takes no memory
            real = torch.ones(1, 1, dtype=torch.bool).expand(len(rows), self.sequence_length)
        else:
            real = torch.from_numpy(np.arange(self.sequence_length) < lengths)
        names = ("input_ids", "position_ids", "labels", "source")[: rows.shape[1]]
        tensors = {name: torch.from_numpy(rows[:, row]) for row, name in enumerate(names)}
        return Sequences(**tensors, real=real)

    def _finish(self, sequence: _Open) -> None:
        self.full.append(sequence.padded(separate=not self.alone))
        self.lengths.append(sequence.used)
        self.open.remove(sequence)

    def _begin(self, labels: NDArray[np.int32], start: int) -> int:
        """The start of the next piece: `start`, or later so that the piece has a scored token."""
        if not self.scored_only:
            return start
        later = (labels[start + 1 :] != IGNORED).nonzero()[0]
        if not len(later):
            return len(labels)
        first, prefix = start + 1 + int(later[0]), len(self.prefix)
        room = self._fullest(prefix + 1 if start else 1).room
        room_later = room - prefix  # of a piece that begins within the document
        if first < start + (room_later if start else room) or room_later < 1:
            return start
        # The rest of the document if it fits; else half of the room is before the first scored one.
        return max(start, min(len(labels) - room_later, first - room_later // 2))


def build_sequences(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    num_sequences: int,
    model: Checkpoint | None = None,
    cache: Path | None = None,
    alone: bool = False,
) -> Sequences:
    """Build `num_sequences` sequences of a split; the sources' token shares follow their weights.

    Every sequence, and every document in it, begins with the tokens (BOS) that the tokenizer puts
    before any text. Reads only as much text as needed. A smaller build has the first sequences of a
    larger one. For `train` a source that is used up starts again in another order. In other splits
    it is left out, and a message says so if there are fewer sequences than requested. `cache` is
    the folder for files of `package:` sources (see sources.resolve). With `alone`, each sequence
    has one document and padding after it.
    Raises UserError if there is no token to score, and for a token id beyond the embedding of
    `model`.
    """
    assert num_sequences >= 1, num_sequences
    tagged = any(source.losses is not None for source in data.sources)
    pad, prefix = _pad_id(tokenizer, model), prefix_ids(tokenizer)
    packer = Packer(data.sequence_length, pad, split == "train", tagged, prefix, alone)
    counter = Progress(f"reading {split} text", num_sequences * data.sequence_length, "tokens")
    for document in blend(BuildContext(data, tokenizer, split, cache, model, counter)):
        packer.add(document)
        counter.advance(len(document.ids))
        if len(packer.full) >= num_sequences:
            break
    if counter.shown:
        counter.finish()
    sequences = packer.sequences(num_sequences)
    if sequences.scored_tokens < 1:
        raise UserError(
            f"too little text: the {split} split has {packer.documents} documents with "
            f"{packer.tokens} tokens, none to score, and {num_sequences} sequences of "
            f"{data.sequence_length} tokens are needed; add text or change the split's fraction"
        )
    if len(sequences) < num_sequences:
        say(
            f"data: there is text for {len(sequences)} {split} sequences instead of "
            f"{num_sequences}; using those"
        )
    return sequences


def _pad_id(tokenizer: PreTrainedTokenizerBase, model: Checkpoint | None) -> int:
    """The token id for padding. Every model can look it up, and it is never scored."""
    rows = embedding_rows(model) if model is not None else math.inf
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(i) for i in ids if i is not None and i < rows), 0)
