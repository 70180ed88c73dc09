"""Targets from the log-probabilities that came with a teacher's answers.

A teacher that answers from a server cannot be run over text, but its answers can have, for each
token, the most likely tokens and their log-probabilities. A distribution depends on the text before
it alone. It is therefore found by a hash of the document's ids before it, however the documents are
packed.

Shapes: B sequences, T tokens, N tokens with a distribution, K known ids.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow.data.documents import Document, read_row, tokenize
from regrow.data.files import sha256_of
from regrow.data.sequences import IGNORED, Sequences
from regrow.errors import UserError
from regrow.runtime.rows import Row
from regrow.training.cache.sparse import PADDING, Sparse

ANSWERS = "answers.jsonl"
TOP_LOGPROBS = "top_logprobs.jsonlines"
"""The log-probabilities of the answers, beside them. No reader of text has this ending, so that the
folder can be given as data."""
TOKENIZED_AT_ONCE = 256

UNKNOWN = -1
Distribution = dict[int, float]
"""Probabilities by id; the rest to 1 belongs to all other ids."""


class Stored(NamedTuple):
    """The distributions of a folder, in the order of their keys."""

    keys_N: np.ndarray
    """The hashes of the text before them, as uint64."""
    ids_NK: Tensor
    """The ids, as int32, then PADDING."""
    probability_NK: Tensor
    """Their probabilities, as float32, then 0."""


class AnswerTargets:
    """The teacher's distributions in a folder of `regrow generate`, by the text before them.

    Tokens that are no token of `tokenizer` belong to the rest. Where the answer is tokenized in
    another way than the teacher wrote it, the distributions after that place are left out. Raises
    UserError for a folder without log-probabilities; all of its files are read by `read`, or when
    a distribution is needed.
    """

    def __init__(
        self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int
    ) -> None:
        self.folder, self.vocab_size = Path(folder).expanduser(), vocab_size
        self.tokenizer = tokenizer
        self._stored: Stored | None = None
        check_logprobs(self.folder)

    def read(self) -> Stored:
        """The distributions, read from the files the first time.

        Raises UserError for a broken file, and if no distribution fits.
        """
        if self._stored is None:
            self._stored = self._read()
        return self._stored

    def _read(self) -> Stored:
        found, vocabulary = _Found(), _Vocabulary(self.tokenizer)
        for document, entries in _answers(self.folder, self.tokenizer):
            places = dict(_places(document, entries, vocabulary, self.vocab_size))
            for at, key in enumerate(_keys(document.ids, range(len(document.ids)))):
                if at in places:
                    found.add(key, places[at])
        if not found.keys:
            raise UserError(
                f"{self.folder / TOP_LOGPROBS}: no token of the answers is a token of this model: "
                "its teacher has another tokenizer; leave answer_targets out"
            )
        return found.stored()

    @property
    def fingerprint(self) -> str:
        """The hash of the file of log-probabilities."""
        return sha256_of(self.folder / TOP_LOGPROBS)

    def sparse(self, batch: dict[str, Tensor]) -> Sparse:
        """The distributions of a batch's scored tokens; a token without one has probability 1."""
        stored, (rows_N, targets_N) = self.read(), self._rows(batch)
        there_N = rows_N >= 0
        ids_NK = torch.full((len(rows_N), stored.ids_NK.shape[1]), PADDING)
        probability_NK = torch.zeros(ids_NK.shape)
        ids_NK[there_N] = stored.ids_NK[rows_N[there_N]].long()
        probability_NK[there_N] = stored.probability_NK[rows_N[there_N]]
        ids_NK[~there_N, 0], probability_NK[~there_N, 0] = targets_N[~there_N], 1.0
        tail_N = (1 - probability_NK.sum(-1)).clamp_min(0)
        return Sparse(self.vocab_size, ids_NK, probability_NK, tail_N).to(batch["labels"].device)

    def coverage(self, sequences: Sequences) -> float:
        """The share of the scored tokens that have a distribution."""
        rows = [self._rows(batch)[0] >= 0 for batch in sequences.batches(64)]
        return float(torch.cat(rows).float().mean())

    def _rows(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """For each scored token the number of its distribution, or −1, and its id."""
        keys, targets = list[int](), list[int]()
        names = ("input_ids", "position_ids", "labels")
        for ids, positions, labels in zip(*(batch[name].tolist() for name in names), strict=True):
            for at, key in enumerate(_keys(ids, positions)):
                if at and labels[at] != IGNORED:
                    keys.append(key)
                    targets.append(labels[at])
        keys_N, wanted_N = self.read().keys_N, np.array(keys, dtype=np.uint64)
        at_N = np.searchsorted(keys_N, wanted_N).clip(max=len(keys_N) - 1)
        rows_N = np.where(keys_N[at_N] == wanted_N, at_N, -1)
        return torch.from_numpy(rows_N), torch.tensor(targets, dtype=torch.long)


class _Found:
    """Distributions in growing arrays of plain numbers, in the order of the answers.

    A distribution takes 8 bytes for each id in it; as a dict it would take twenty times as much.
    """

    def __init__(self) -> None:
        self.keys, self.lengths = array("Q"), array("i")
        self.ids, self.probabilities = array("i"), array("f")

    def add(self, key: int, known: Distribution) -> None:
        self.keys.append(key)
        self.lengths.append(len(known))
        self.ids.extend(known)
        self.probabilities.extend(known.values())

    def stored(self) -> Stored:
        """The distributions in the order of their keys; the later one of equal keys counts."""
        keys_N = np.frombuffer(self.keys, np.uint64)
        order_N = np.argsort(keys_N, kind="stable")
        rows_N = order_N[np.append(np.diff(keys_N[order_N]) != 0, True)]
        lengths_N = np.frombuffer(self.lengths, np.int32)
        ends_N = lengths_N.cumsum(dtype=np.int64)[rows_N]
        lengths_N = lengths_N[rows_N]
        ids_NK = np.full((len(rows_N), lengths_N.max()), PADDING, dtype=np.int32)
        probability_NK = np.zeros(ids_NK.shape, dtype=np.float32)
        for k in range(ids_NK.shape[1]):  # column by column, so that no index is as large as these
            has_N = np.flatnonzero(lengths_N > k)
            at_N = ends_N[has_N] - lengths_N[has_N] + k
            ids_NK[has_N, k] = np.frombuffer(self.ids, np.int32)[at_N]
            probability_NK[has_N, k] = np.frombuffer(self.probabilities, np.float32)[at_N]
        return Stored(keys_N[rows_N], torch.from_numpy(ids_NK), torch.from_numpy(probability_NK))


def check_logprobs(folder: Path) -> None:
    """Raise UserError for a folder of answers without log-probabilities, or with a broken file.

    Only the first row of each file is read.
    """
    for name in (ANSWERS, TOP_LOGPROBS):
        if not (folder / name).exists():
            raise UserError(
                f"answer_targets top_logprobs: {folder} has no {name}: generate the answers with "
                "--top-logprobs 20, or leave answer_targets out"
            )
        next(_rows_of(folder / name), None)


def _answers(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, list[Row]]]:
    """The answers as documents, each with what the teacher said of its tokens."""
    scored = folder / TOP_LOGPROBS
    begins = {row["id"]: begin if row["tokens"] else None for begin, row in _rows_of(scored)}
    rows = (row for _, row in _rows_of(folder / ANSWERS) if begins.get(row["id"]) is not None)
    with scored.open("rb") as file:
        while part := list(islice(rows, TOKENIZED_AT_ONCE)):
            passages = [read_row(row, f"{folder / ANSWERS}, answer {row['id']}") for row in part]
            for row, document in zip(part, tokenize(passages, tokenizer), strict=True):
                file.seek(begins[row["id"]] or 0)
                yield document, json.loads(file.readline())["tokens"]


def _rows_of(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield each row of a file, one at a time, with the byte at which its line begins."""
    begin = 0
    try:
        with path.open("rb") as file:
            for line in file:
                yield begin, json.loads(line)
                begin += len(line)
    except ValueError as error:
        raise UserError(f"{path} is broken ({error}): generate the answers again") from None


class _Vocabulary:
    """Finds ids of tokens, written as in the vocabulary (`Ġthe`) or as their text (` the`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.stored = tokenizer.get_vocab()
        # After another token, because a decoder may drop a space before the first one.
        first = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        size = len(_decoded(tokenizer, [first])[0])
        ids = sorted(self.stored.values())
        self.texts: dict[str, int | None] = {}
        for number, text in zip(ids, _decoded(tokenizer, [[*first, i] for i in ids]), strict=True):
            # Tokens with the same text, such as parts of a character, are not told apart.
            self.texts[text[size:]] = None if text[size:] in self.texts else number

    def spelling(self, tokens: Sequence[str], ids: Sequence[int]) -> dict[str, Any]:
        """The spelling in which more of the `tokens` have these `ids`."""
        spellings: list[dict[str, Any]] = [self.stored, self.texts]
        pairs = list(zip(tokens, ids, strict=False))
        return max(spellings, key=lambda each: sum(each.get(t) == i for t, i in pairs))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return texts


def _places(
    document: Document, entries: Sequence[Row], vocabulary: _Vocabulary, vocab_size: int
) -> Iterator[tuple[int, Distribution]]:
    """Yield the index of each token of the answer with its distribution.

    The first distribution after which the teacher's token is another one is the last: what follows
    has another text before it.
    """
    scored = _last_run(document.scored)
    own = [document.ids[at] for at in scored]
    tokens = [entry["token"] for entry in entries]
    ids = vocabulary.spelling(tokens, own)
    for at, token, number, entry in zip(scored, tokens, own, entries, strict=False):
        # A text of several tokens counts as the one that is there, and so does an empty one, as
        # which some servers name the end mark.
        written = ids.get(token, UNKNOWN) if token else number
        written = number if written is None else written
        said = {ids.get(each): math.exp(logprob) for each, logprob in entry["top"]}
        said[written] = math.exp(entry["logprob"])
        known = {i: p for i, p in said.items() if i is not None and 0 <= i < vocab_size}
        total = max(1.0, sum(known.values()))
        if known:
            yield at, {i: p / total for i, p in known.items()}
        if written != number:
            return


def _last_run(scored: list[bool]) -> list[int]:
    """The indices of the last scored tokens: the answer, without answers in the prompt."""
    end = max((at for at, own in enumerate(scored) if own), default=-1)
    start = end
    while start > 0 and scored[start - 1]:
        start -= 1
    return list(range(max(start, 0), end + 1))


def _keys(ids: Sequence[int], positions: Sequence[int]) -> Iterator[int]:
    """For each token the hash of the ids before it in its document, which begins at position 0."""
    hasher = hashlib.blake2b(digest_size=8)
    for number, position in zip(ids, positions, strict=True):
        if position == 0:
            hasher = hashlib.blake2b(digest_size=8)
        yield int.from_bytes(hasher.copy().digest(), "little")
        hasher.update(number.to_bytes(4, "little"))
