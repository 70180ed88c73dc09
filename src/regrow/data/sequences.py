"""Packed token sequences of exactly T tokens, from sources blended by token share and shuffled.

Shapes: n sequences, T = sequence length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from regrow.data.config import DataConfig, Split
from regrow.data.documents import Document, Passage, pieces, read_row, split_of, tokenize
from regrow.data.sources import rows
from regrow.errors import UserError
from regrow.runtime.progress import Progress, say

IGNORED = -100
"""The label of a token that is not scored."""
VALIDATE_EVERY = 8
"""Of calibration blocks that something is fitted on, every 8th is held out to choose it by."""


def held_out(number: int) -> bool:
    """Whether a calibration block, by its number, is held out from what is fitted on the others."""
    return number % VALIDATE_EVERY == VALIDATE_EVERY - 1


class Sequences(Dataset[dict[str, Tensor]]):
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

    def select(self, indices: Sequence[int]) -> Sequences:
        """The blocks at these indices."""
        rows = torch.tensor(list(indices), dtype=torch.int64)
        return Sequences(**{name: tensor[rows] for name, tensor in self._tensors().items()})

    def save(self, path: Path) -> None:
        """Write the tensors to a safetensors file, ids as int32."""
        narrow = {
            name: tensor if tensor.dtype == torch.bool else tensor.int()
            for name, tensor in self._tensors().items()
        }
        save_file({name: tensor.contiguous() for name, tensor in narrow.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Sequences:
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
        self.sequence = self._empty()
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
            self.sequence[0, here] = ids[taken]
            self.sequence[1, here] = np.arange(room)
            self.sequence[2, here] = labels[taken]
            self.sequence[2, self.used] = IGNORED
            self.sequence[3:, here] = document.source
            self.used, start = self.used + room, start + room
            if self.used == self.sequence_length:
                self.full.append(self.sequence)
                self.sequence, self.used = self._empty(), 0
            start = self._begin(labels, start)

    def sequences(self, num_sequences: int) -> Sequences:
        """The first `num_blocks` full blocks, or those there are; n may be 0.

        An incomplete last block is dropped unless it is the only one; then it is padded, the
        padding not scored and a document of its own.
        """
        full = self.full[:num_sequences]
        real = np.ones((len(full), self.sequence_length), dtype=bool)
        if not full and self.used:
            full = [self.sequence.copy()]
            full[0][1, self.used :] = np.arange(self.sequence_length - self.used)
            real = (np.arange(self.sequence_length) < self.used)[None]
        ids, positions, labels, *source = (
            _stacked([sequence[row] for sequence in full], real)
            for row in range(len(self.sequence))
        )
        return Sequences(ids, positions, labels, torch.from_numpy(real), *source)

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


SHUFFLED_PASSAGES = 1_000
SHUFFLED_CHARACTERS = 2_000_000
READ_AHEAD = 8_000_000
"""Characters read to fill the shuffle buffer, at most about: a small split has a smaller buffer."""
TOKENIZED_AT_ONCE = 32
PIECE = 8_000
"""Characters of a section of a long document, or eight per token of a block if that is more."""


@dataclass(frozen=True)
class BuildContext:
    """What every step of a build needs to know."""

    data: DataConfig
    tokenizer: PreTrainedTokenizerBase
    split: Split
    cache: Path | None


def build_sequences(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    num_sequences: int,
    cache: Path | None = None,
) -> Sequences:
    """`num_blocks` blocks of a split, in which the sources' token shares follow their weights.

    Reads only as far as it needs. Fewer blocks are always the first of more. For `train` a source
    that is used up starts over in another order; otherwise it is left out and there may be fewer
    blocks than asked for, which is told. `cache` is for `package:` sources (see sources.resolve).
    Raises UserError when there is not one token to score.
    """
    assert num_sequences >= 1, num_sequences
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tagged = any(source.losses is not None for source in data.sources)
    packer = Packer(data.sequence_length, pad if pad is not None else 0, split == "train", tagged)
    counter = Progress(f"reading {split} text", num_sequences * data.sequence_length, "tokens")
    for document in blend(BuildContext(data, tokenizer, split, cache)):
        packer.add(document)
        counter.advance(len(document.ids))
        if len(packer.full) >= num_sequences:
            break
    if counter.last > counter.start:  # it took long enough to show
        counter.finish()
    sequences = packer.sequences(num_sequences)
    if sequences.scored_tokens < 1:
        raise UserError(
            f"too little text: the {split} split has {packer.documents} documents with "
            f"{packer.tokens} tokens, none to score, and {num_sequences} blocks of "
            f"{data.sequence_length} tokens are needed; add text or change the split's fraction"
        )
    if len(sequences) < num_sequences:
        say(f"data: text for {len(sequences)} {split} blocks, not for {num_sequences}; using those")
    return sequences


def blend(job: BuildContext) -> Iterator[Document]:
    """Documents of all sources; each time from the one furthest below its share so far."""
    weights = {number: source.weight for number, source in enumerate(job.data.sources)}
    streams = {number: _documents(number, job) for number in weights}
    given = dict.fromkeys(weights, 0)
    while streams:
        total, weight = sum(given[n] for n in streams), sum(weights[n] for n in streams)
        number = max(streams, key=lambda n: weights[n] / weight * total - given[n])
        document = next(streams[number], None)
        if document is None:
            del streams[number]
            if streams:
                name = job.data.sources[number].source
                say(f"data: {name} has no more {job.split} text; the other sources fill its share")
            continue
        given[number] += len(document.ids)
        yield document


def shuffled(passages: Iterable[Passage], random: Random, characters: int) -> Iterator[Passage]:
    """The passages in random order, of which 1,000 or `characters` are held in memory at most."""
    held: list[Passage] = []
    size = 0
    for passage in passages:
        held.append(passage)
        size += len(passage.text)
        while len(held) > SHUFFLED_PASSAGES or size > characters:
            size -= len(_swap_out(held, random).text)
            yield held.pop()
    random.shuffle(held)
    yield from held


def _swap_out(held: list[Passage], random: Random) -> Passage:
    """Move one at random to the end, where it is cheap to take off."""
    chosen = random.randrange(len(held))
    held[chosen], held[-1] = held[-1], held[chosen]
    return held[-1]


def _documents(number: int, job: BuildContext) -> Iterator[Document]:
    """One source's documents; for train epoch after epoch, each in an order of its own.

    A source in which nothing is scored is read once.
    """
    data, source = job.data, job.data.sources[number]
    epoch = 0
    while True:
        random = Random(f"{data.seed}/{number}/{epoch}")
        stream = shuffled(_passages(number, job), random, _characters_held(job))
        found = False
        while batch := list(islice(stream, TOKENIZED_AT_ONCE)):
            for document in tokenize(batch, job.tokenizer):
                found = found or any(document.scored[1:])
                yield replace(document, source=number)
        if job.split != "train" or not found:
            return
        if epoch == 0:
            say(f"data: {source.source} is used up; its train text starts over in another order")
        epoch += 1


def _passages(number: int, job: BuildContext) -> Iterator[Passage]:
    size = max(PIECE, 8 * job.data.sequence_length)
    for where, row in rows(job.data.sources[number], job.cache):
        passage = read_row(row, where)
        if not passage.text.strip():
            continue
        if split_of(passage.text, job.data, passage.split_at) == job.split:
            yield from pieces(passage, size)


def _characters_held(job: BuildContext) -> int:
    heldout, calibration = job.data.heldout_fraction, job.data.calibration_fraction
    shares = {"heldout": heldout, "calibration": calibration, "train": 1 - heldout - calibration}
    return min(SHUFFLED_CHARACTERS, int(READ_AHEAD * shares[job.split]))
