"""Reads the documents of a split: blends the sources by token share and shuffles each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from regrow.data.config import DataConfig, Split
from regrow.data.documents import (
    Document,
    Passage,
    piece_size,
    pieces,
    read_row,
    split_of,
    tokenize,
)
from regrow.data.prepared import Prepared
from regrow.data.sources import rows
from regrow.errors import UserError
from regrow.runtime.progress import Progress, say

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint

SHUFFLED_PASSAGES = 1_000
SHUFFLED_CHARACTERS = 2_000_000
READ_AHEAD = 8_000_000
"""Characters to read at most to fill the shuffle buffer; a small split has a smaller buffer."""
TOKENIZED_AT_ONCE = 32


class Sized(Protocol):
    """Text, or a reference to text that is stored elsewhere, with its length."""

    @property
    def characters(self) -> int:
        """The length of the text."""


SizedT = TypeVar("SizedT", bound=Sized)


@dataclass(frozen=True)
class BuildContext:
    """The arguments that every step of reading text needs."""

    data: DataConfig
    tokenizer: PreTrainedTokenizerBase
    split: Split
    cache: Path | None = None
    model: Checkpoint | None = None
    """The model that will read the tokens; a token id beyond its embedding raises UserError."""
    counter: Progress | None = None
    """The progress display, which is updated at every row."""


def blend(context: BuildContext) -> Iterator[Document]:
    """Yield documents of all sources; the next one is from the source furthest below its share."""
    weights = {number: source.weight for number, source in enumerate(context.data.sources)}
    streams = {number: _documents(number, context) for number in weights}
    tokens = dict.fromkeys(weights, 0)
    while streams:
        total, weight = sum(tokens[n] for n in streams), sum(weights[n] for n in streams)
        number = max(streams, key=lambda n: weights[n] / weight * total - tokens[n])
        document = next(streams[number], None)
        if document is None:
            del streams[number]
            if streams:
                name = context.data.sources[number].source
                say(
                    f"data: {name} has no more {context.split} text; the other sources fill its "
                    "share"
                )
            continue
        tokens[number] += len(document.ids)
        yield document


def shuffled(passages: Iterable[SizedT], random: Random, characters: int) -> Iterator[SizedT]:
    """Yield the passages in random order.

    The buffer has at most 1,000 passages, and at most `characters` characters of text.
    """
    buffer: list[SizedT] = []
    size = 0
    for passage in passages:
        buffer.append(passage)
        size += passage.characters
        while len(buffer) > SHUFFLED_PASSAGES or size > characters:
            size -= _swap_out(buffer, random).characters
            yield buffer.pop()
    random.shuffle(buffer)
    yield from buffer


def _swap_out(buffer: list[SizedT], random: Random) -> SizedT:
    """Swap a random passage with the last one, which can be removed cheaply, and return it."""
    chosen = random.randrange(len(buffer))
    buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
    return buffer[-1]


def _documents(number: int, context: BuildContext) -> Iterator[Document]:
    """Yield one source's documents; the train split repeats, with a new order in each epoch.

    A source without any scored token is read only once.
    """
    source = context.data.sources[number]
    prepared = Prepared.of(source)
    if prepared is not None:
        prepared.check(context.data, context.tokenizer)
    epoch = 0
    while True:
        name = f"{context.data.seed}/{number}/{epoch}"
        any_scored = False
        for document in (
            _tokenized(number, context, name)
            if prepared is None
            else _stored(prepared, context, name)
        ):
            any_scored = any_scored or any(document.scored[1:])
            if (model := context.model) is not None:
                check_ids(document.ids, context.tokenizer, embedding_rows(model), model.folder)
            yield replace(document, source=number)
        if context.split != "train" or not any_scored:
            return
        if epoch == 0:
            say(f"data: {source.source} is used up; its train text starts over in another order")
        epoch += 1


def _tokenized(number: int, context: BuildContext, name: str) -> Iterator[Document]:
    """Yield one source's documents once; `name` seeds their order."""
    stream = shuffled(_passages(number, context), Random(name), _buffer_characters(context))
    while batch := list(islice(stream, TOKENIZED_AT_ONCE)):
        yield from tokenize(batch, context.tokenizer)


def _stored(prepared: Prepared, context: BuildContext, name: str) -> Iterator[Document]:
    """Yield a prepared source's documents once, in the order that it was prepared for."""
    if prepared.index.order == "shuffled":
        stream = prepared.shuffled(context.data, context.split, name)
    else:
        in_order = prepared.passages(context.data, context.split)
        stream = shuffled(in_order, Random(name), _buffer_characters(context))
    for passage in stream:
        yield prepared.document(passage)


def _passages(number: int, context: BuildContext) -> Iterator[Passage]:
    """Yield one source's passages of the split, in the order of its rows."""
    size = piece_size(context.data.sequence_length)
    for count, (location, row) in enumerate(rows(context.data.sources[number], context.cache), 1):
        if context.counter is not None:
            context.counter.advance(0, f"row {count:,} of {context.data.sources[number].source}")
        passage = read_row(row, location)
        if not passage.text.strip():
            continue
        if split_of(passage.text, context.data, passage.split_at) == context.split:
            yield from pieces(passage, size)


def _buffer_characters(context: BuildContext) -> int:
    shares: dict[Split, float] = {
        "heldout": context.data.heldout_fraction,
        "calibration": context.data.calibration_fraction,
        "validation": context.data.validation_fraction,
    }
    share = shares.get(context.split, 1 - sum(shares.values()))
    return min(SHUFFLED_CHARACTERS, int(READ_AHEAD * share))


class Configured(Protocol):
    """A model with a config: a checkpoint, or a GGUF file."""

    config: dict[str, Any]


def embedding_rows(model: Configured) -> int:
    """The number of token ids that a model can read."""
    return int(model.config["vocab_size"])


def check_ids(
    ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, rows: int, model: Path
) -> None:
    """Raise UserError for a token id beyond the `rows` of a model's embedding."""
    first = next((i for i in ids if i >= rows), None)
    if first is not None:
        token = tokenizer.convert_ids_to_tokens(first)
        raise UserError(
            f"the text has token {first} ({token!r}), but the embedding of {model} has only {rows} "
            "rows: remove that token from the text or the chat template, or use the tokenizer "
            "that the model was trained with"
        )
