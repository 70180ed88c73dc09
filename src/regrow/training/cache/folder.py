"""The folder of a cache: `cache.json` is the header; `train/` and `heldout/` have the sequences.

A sequence is looked up by its key, a hash of all inputs that determine the teacher's output.
Held-out sequences are always stored as the exact last hidden state. Their KL, which chooses the
best student, is therefore the same as with the live teacher, for every format of the training
sequences.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from regrow import stage_dir
from regrow.checkpoint import Checkpoint
from regrow.config import Config, parse
from regrow.data.sequences import IGNORED
from regrow.errors import UserError
from regrow.training.cache.formats import Format, make
from regrow.training.cache.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from regrow.data.sequences import Sequences


def sequence_keys(batch: dict[str, Tensor]) -> list[bytes]:
    """The SHA-256 of each sequence's ids, positions and scored tokens: B keys of 32 bytes."""
    scored = batch["labels"] != IGNORED
    rows = torch.stack([batch["input_ids"], batch["position_ids"], scored.long()], dim=1)
    return [hashlib.sha256(row.tobytes()).digest() for row in rows.int().cpu().numpy()]


HEADER = "cache.json"
SPLITS = ("train", "heldout")
VERSION = 1


class Header(Config):
    """The header of a cache, as written to cache.json."""

    version: int
    """Version of the folder's layout, which is 1."""
    format: str
    """Format of the sequences to train on: the name of a file in training/cache/formats."""
    settings: dict[str, int | str]
    """Settings of the format."""
    teacher: str
    """Fingerprint of the teacher."""
    tokenizer: str
    """Fingerprint of its tokenizer."""
    vocab_size: int
    """Number of ids in a distribution: the tokenizer's ids, without padding."""
    hidden_size: int
    """Channels of the teacher's last hidden state."""
    sequence_length: int
    """Tokens per sequence."""
    data: str
    """Digest of the text that was cached last."""
    figures: dict[str, float] = Field(default_factory=dict)
    """Measured figures: bytes per token, and the error in nats."""

    def formats(self) -> dict[str, Format]:
        """The format of each split."""
        values = {**self.settings, "vocab_size": self.vocab_size, "hidden_size": self.hidden_size}
        exact = make("hidden", {**values, "dtype": "bfloat16"})
        return {"train": make(self.format, values), "heldout": exact}

    @property
    def fingerprint(self) -> str:
        """The digest of all settings that affect the stored tensors of a sequence."""
        return stage_dir.digest(self.model_dump(exclude={"data", "figures", "sequence_length"}))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The digest of the tokens and their ids."""
    return stage_dir.digest(sorted(tokenizer.get_vocab().items()))


class Cache:
    """A finished cache; raises UserError if the folder has no cache or a broken one."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.header = _read(self.folder)
        self.formats = self.header.formats()
        self.stores = {split: Store(self.folder / split) for split in SPLITS}
        for store in self.stores.values():
            if store.broken:
                raise UserError(
                    f"{store.broken[0]} is broken: delete it and run regrow cache again, which "
                    "adds the missing sequences"
                )

    @property
    def fingerprint(self) -> str:
        """The digest of teacher, tokenizer and format; the stored sequences do not affect it."""
        return self.header.fingerprint

    def check_teacher(self, teacher: Checkpoint) -> None:
        """Raise UserError if the cache is from another teacher or tokenizer."""
        for what, cached, given in (
            ("teacher", self.header.teacher, teacher.fingerprint),
            ("tokenizer", self.header.tokenizer, tokenizer_fingerprint(teacher.tokenizer())),
        ):
            if cached != given:
                raise UserError(
                    f"the cache {self.folder} was made with another {what} than that of "
                    f"{teacher.folder} (fingerprint {cached[:12]}, not {given[:12]}): give that "
                    "one, or make a cache of this one with regrow cache"
                )

    def check_sequences(self, sequences: Sequences, split: str) -> None:
        """Raise UserError if a sequence with a scored token is missing from the cache."""
        length = sequences.length
        wanted = [key for key, there in _keyed(sequences) if there]
        missing = sum(key not in self.stores[split] for key in wanted)
        if not missing:
            return
        cached = self.header.sequence_length
        lengths = f"sequences have {length} tokens, those in the cache {cached}; "
        more = f"--tokens {len(sequences) * length}" if split == "train" else ""
        raise UserError(
            f"{missing} of {len(wanted)} {split} sequences are not in the cache {self.folder}: "
            f"{lengths if length != cached else ''}run regrow cache with "
            f"the same data and {more or f'--heldout-sequences {len(sequences)}'} into that "
            "folder, which adds what is missing"
        )


def _keyed(sequences: Sequences) -> list[tuple[bytes, bool]]:
    """The key of each sequence, and whether it has a scored token."""
    keyed: list[tuple[bytes, bool]] = []
    for batch in sequences.batches(256):
        there = (batch["labels"][:, 1:] != IGNORED).any(-1).tolist()
        keyed += zip(sequence_keys(batch), there, strict=True)
    return keyed


def missing_sequences(sequences: Sequences, *stores: Store) -> dict[bytes, int]:
    """The numbers of the sequences that are not yet stored, by key; duplicates count once."""
    keyed = [(key, n) for n, (key, there) in enumerate(_keyed(sequences)) if there]
    first = dict(reversed(keyed))
    return {key: n for key, n in first.items() if not any(key in store for store in stores)}


def _read(folder: Path) -> Header:
    path = folder / HEADER
    try:
        header: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no cache at {folder}: make one with regrow cache TEACHER --data … --out {folder}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): make the cache again") from None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise UserError(f"{path} is no cache of version {VERSION}: make it again with regrow cache")
    return parse(Header, header, str(path))
