"""Prepared text: the tokens of a source in memory-mapped shards, as `regrow prepare` writes them.

The folder of a source has index.json and numbered shards. A shard has three arrays of NumPy:
ids.npy (uint16, or int32 for larger ids) has the tokens of all its passages, scored.npy has one bit
for each token, and passages.npy has for each passage where its tokens end, its length in
characters, and the number in [0, 1) that decides its split. Positions need no array: they begin at
0 with each passage.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from regrow import stage_dir
from regrow.data.config import DataConfig, SourceConfig, Split
from regrow.data.documents import Document, Passage, piece_size, tokenize
from regrow.data.files import content_of, local_files
from regrow.data.prepared_folder import Index, PreparedFolder, SourceFile, broken, name_in
from regrow.errors import UserError

PASSAGES = np.dtype([("end", "<i8"), ("characters", "<i8"), ("place", "<f8")])
TOKENIZED_AT_ONCE = 256
OPEN_SHARDS = 1_024


class Stored(NamedTuple):
    """A passage in a shard."""

    shard: int
    number: int
    characters: int


class Shard(NamedTuple):
    """The memory-mapped arrays of a shard."""

    ids: NDArray[Any]
    scored: NDArray[np.uint8]
    passages: NDArray[Any]


class Prepared(PreparedFolder):
    """The tokens of one source; raises UserError for a folder with a broken index."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def check(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError if `data` or `tokenizer` is not what the tokens were prepared with."""
        piece = piece_size(data.sequence_length)
        for what, stored, given in (
            ("tokenizer", self.index.tokenizer[:12], tokenizer_digest(tokenizer)[:12]),
            ("seed of the splits", self.index.seed, data.seed),
            ("section length for this sequence_length", self.index.piece, piece),
        ):
            if stored != given:
                raise UserError(
                    f"{self.folder} was prepared with another {what} ({stored}, not {given}): run "
                    "regrow prepare again with this one"
                )
        self.check_source()

    def passages(self, data: DataConfig, split: Split) -> Iterator[Stored]:
        """Yield the passages of a split in the order of the source's rows."""
        for shard in range(len(self.index.shards)):
            stored = self._shard(shard).passages
            chosen = np.flatnonzero(in_split(stored["place"], data, split))
            for number, characters in zip(
                chosen.tolist(), stored["characters"][chosen].tolist(), strict=True
            ):
                yield Stored(shard, number, characters)

    def shuffled(self, data: DataConfig, split: Split, seed: str) -> Iterator[Stored]:
        """Yield the passages of a split in an order that is random over the whole source."""
        chosen = [
            np.flatnonzero(in_split(self._shard(shard).passages["place"], data, split)) + start
            for shard, start in enumerate(self._starts()[:-1])
        ]
        numbers = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
        random = np.random.default_rng(list(blake2b(seed.encode(), digest_size=16).digest()))
        random.shuffle(numbers)
        starts = self._starts()
        for number in numbers:
            shard = int(np.searchsorted(starts, number, side="right")) - 1
            yield Stored(shard, int(number - starts[shard]), 0)

    def document(self, passage: Stored) -> Document:
        """The tokens of a passage, and for each whether it is scored."""
        shard = self._shard(passage.shard)
        start = int(shard.passages["end"][passage.number - 1]) if passage.number else 0
        end = int(shard.passages["end"][passage.number])
        bits = np.unpackbits(shard.scored[start // 8 : -(-end // 8)])
        scored = bits[start % 8 : start % 8 + end - start].astype(bool)
        return Document(shard.ids[start:end].tolist(), scored.tolist())

    def _starts(self) -> NDArray[np.int64]:
        """The number of the first passage of each shard, and the number of all passages."""
        return np.concatenate([[0], np.cumsum(self.index.shards, dtype=np.int64)])

    def _open(self, number: int) -> Shard:
        folder = shard_folder(self.folder, number)
        try:
            shard = Shard(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in NAMES))
        except (OSError, ValueError):
            raise broken(folder) from None
        if len(shard.passages) != self.index.shards[number]:
            raise broken(folder)
        return shard


NAMES = Shard._fields


def in_split(places: NDArray[np.float64], data: DataConfig, split: Split) -> NDArray[np.bool_]:
    """Which of the `places`, numbers in [0, 1), are in the split; the same rule as `split_of`."""
    heldout = places < data.heldout_fraction
    learned_from = data.heldout_fraction + data.calibration_fraction
    calibration = ~heldout & (places < learned_from)
    rest = ~heldout & ~calibration
    validation = rest & (places - learned_from < data.validation_fraction)
    masks: dict[Split, NDArray[np.bool_]] = {
        "heldout": heldout,
        "calibration": calibration,
        "validation": validation,
        "train": rest & ~validation,
    }
    return masks[split]


def new_index(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    order: Literal["shuffled", "files"],
) -> Index:
    """The index of a source before its text is read; it hashes the source's files."""
    path = Path(source.source).expanduser()
    files = []
    for file in local_files(source.source):
        stat = file.stat()
        content = content_of(file, stat.st_size, stat.st_mtime_ns)
        name = name_in(file, source.source)
        files.append(
            SourceFile(name=name, size=stat.st_size, changed=stat.st_mtime_ns, sha256=content)
        )
    name = str(path.absolute()) if path.exists() else source.source
    return Index(
        source=source.model_copy(update={"source": name, "weight": 1.0, "losses": None}),
        files=files,
        tokenizer=tokenizer_digest(tokenizer),
        seed=data.seed,
        piece=piece_size(data.sequence_length),
        order=order,
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The SHA-256 of all that decides how text and conversations are tokenized, as hex."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for set_by_calls in ("truncation", "padding"):
            rules.pop(set_by_calls, None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    return stage_dir.digest(rules, tokenizer.chat_template, tokenizer.special_tokens_map)


def shard_folder(folder: Path, number: int) -> Path:
    """The folder of a shard; it exists only if the shard is complete."""
    return folder / f"{number:06d}"


def write_shard(
    folder: Path,
    number: int,
    passages: Sequence[tuple[Passage, float]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Tokenize passages, each with the number that decides its split, and write them as a shard.

    The shard is written beside its place and renamed, so that a kill never leaves half of it.
    """
    ids: list[NDArray[np.int32]] = []
    scored: list[NDArray[np.bool_]] = []
    for at in range(0, len(passages), TOKENIZED_AT_ONCE):
        batch = passages[at : at + TOKENIZED_AT_ONCE]
        for document in tokenize([passage for passage, _ in batch], tokenizer):
            ids.append(np.array(document.ids, dtype=np.int32))
            scored.append(np.array(document.scored, dtype=bool))
    table = np.empty(len(passages), dtype=PASSAGES)
    table["end"] = np.cumsum([len(each) for each in ids])
    table["characters"] = [passage.characters for passage, _ in passages]
    table["place"] = [place for _, place in passages]
    tokens = np.concatenate(ids)
    narrow = np.uint16 if tokens.max(initial=0) < 1 << 16 else np.int32
    partial = folder / f".{number:06d}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    np.save(partial / "ids.npy", tokens.astype(narrow))
    np.save(partial / "scored.npy", np.packbits(np.concatenate(scored)))
    np.save(partial / "passages.npy", table)
    partial.rename(shard_folder(folder, number))


def shard_size(folder: Path, number: int) -> tuple[int, int]:
    """The number of passages and of tokens in a finished shard."""
    ends = np.load(shard_folder(folder, number) / "passages.npy", mmap_mode="r")["end"]
    return len(ends), int(ends[-1])
