"""Sources, shuffled and blended by token share, as packed blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerBase

from regrow.data.blocks import Blocks
from regrow.data.config import DataConfig, Split
from regrow.data.documents import Document, Passage, pieces, read_row, split_of, tokenize
from regrow.data.pack import Packer
from regrow.data.sources import rows
from regrow.errors import UserError
from regrow.progress import Progress, say

SHUFFLED_PASSAGES = 1_000
SHUFFLED_CHARACTERS = 2_000_000
READ_AHEAD = 8_000_000
"""Characters read to fill the shuffle buffer, at most about: a small split has a smaller buffer."""
TOKENIZED_AT_ONCE = 32
PIECE = 8_000
"""Characters of a section of a long document, or eight per token of a block if that is more."""


@dataclass(frozen=True)
class Job:
    """What every step of a build needs to know."""

    data: DataConfig
    tokenizer: PreTrainedTokenizerBase
    split: Split
    cache: Path | None


def build_blocks(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    num_blocks: int,
    cache: Path | None = None,
) -> Blocks:
    """`num_blocks` blocks of a split, in which the sources' token shares follow their weights.

    Reads only as far as it needs. Fewer blocks are always the first of more. For `train` a source
    that is used up starts over in another order; otherwise it is left out and there may be fewer
    blocks than asked for, which is told. `cache` is for `package:` sources (see sources.resolve).
    Raises UserError when there is not one token to score.
    """
    assert num_blocks >= 1, num_blocks
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tagged = any(source.losses is not None for source in data.sources)
    packer = Packer(data.sequence_length, pad if pad is not None else 0, split == "train", tagged)
    counter = Progress(f"reading {split} text", num_blocks * data.sequence_length, "tokens")
    for document in blend(Job(data, tokenizer, split, cache)):
        packer.add(document)
        counter.advance(len(document.ids))
        if len(packer.full) >= num_blocks:
            break
    if counter.last > counter.start:  # it took long enough to show
        counter.finish()
    blocks = packer.blocks(num_blocks)
    if blocks.scored_tokens < 1:
        raise UserError(
            f"too little text: the {split} split has {packer.documents} documents with "
            f"{packer.tokens} tokens, none to score, and {num_blocks} blocks of "
            f"{data.sequence_length} tokens are needed; add text or change the split's fraction"
        )
    if len(blocks) < num_blocks:
        say(f"data: text for {len(blocks)} {split} blocks, not for {num_blocks}; using those")
    return blocks


def blend(job: Job) -> Iterator[Document]:
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


def _documents(number: int, job: Job) -> Iterator[Document]:
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


def _passages(number: int, job: Job) -> Iterator[Passage]:
    size = max(PIECE, 8 * job.data.sequence_length)
    for where, row in rows(job.data.sources[number], job.cache):
        passage = read_row(row, where)
        if not passage.text.strip():
            continue
        if split_of(passage.text, job.data, passage.split_at) == job.split:
            yield from pieces(passage, size)


def _characters_held(job: Job) -> int:
    heldout, calibration = job.data.heldout_fraction, job.data.calibration_fraction
    shares = {"heldout": heldout, "calibration": calibration, "train": 1 - heldout - calibration}
    return min(SHUFFLED_CHARACTERS, int(READ_AHEAD * shares[job.split]))
