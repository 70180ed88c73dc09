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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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


class AnswerTargets:
    """The teacher's distributions in a folder of `regrow generate`, by the text before them.

    Tokens that are no token of `tokenizer` belong to the rest. Where the answer is tokenized in
    another way than the teacher wrote it, the distributions after that place are left out. Raises
    UserError for a folder without log-probabilities, and if none of them fits.
    """

    def __init__(
        self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int
    ) -> None:
        self.folder, self.vocab_size = Path(folder).expanduser(), vocab_size
        check_logprobs(self.folder)
        found, vocabulary = dict[int, Distribution](), _Vocabulary(tokenizer)
        for document, entries in _answers(self.folder, tokenizer):
            places = dict(_places(document, entries, vocabulary, vocab_size))
            keys = _keys(document.ids, range(len(document.ids)))
            found |= {key: places[at] for at, key in enumerate(keys) if at in places}
        if not found:
            raise UserError(
                f"{self.folder / TOP_LOGPROBS}: no token of the answers is a token of this model: "
                "its teacher has another tokenizer; leave answer_targets out"
            )
        order = sorted(found)
        wide = max(map(len, found.values()))
        self.keys_N = np.array(order, dtype=np.uint64)
        ids_NK = np.full((len(order), wide), PADDING, dtype=np.int32)
        probability_NK = np.zeros((len(order), wide), dtype=np.float32)
        for row, known in enumerate(map(found.__getitem__, order)):
            ids_NK[row, : len(known)] = list(known)
            probability_NK[row, : len(known)] = list(known.values())
        self.ids_NK, self.probability_NK = map(torch.from_numpy, (ids_NK, probability_NK))

    @property
    def fingerprint(self) -> str:
        """The hash of the file of log-probabilities."""
        return sha256_of(self.folder / TOP_LOGPROBS)

    def sparse(self, batch: dict[str, Tensor]) -> Sparse:
        """The distributions of a batch's scored tokens; a token without one has probability 1."""
        rows_N, targets_N = self._rows(batch)
        there_N = rows_N >= 0
        ids_NK = torch.full((len(rows_N), self.ids_NK.shape[1]), PADDING)
        probability_NK = torch.zeros(ids_NK.shape)
        ids_NK[there_N] = self.ids_NK[rows_N[there_N]].long()
        probability_NK[there_N] = self.probability_NK[rows_N[there_N]]
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
        wanted_N = np.array(keys, dtype=np.uint64)
        at_N = np.searchsorted(self.keys_N, wanted_N).clip(max=len(self.keys_N) - 1)
        rows_N = np.where(self.keys_N[at_N] == wanted_N, at_N, -1)
        return torch.from_numpy(rows_N), torch.tensor(targets, dtype=torch.long)


def check_logprobs(folder: Path) -> None:
    """Raise UserError for a folder of answers without log-probabilities."""
    for name in (ANSWERS, TOP_LOGPROBS):
        if not (folder / name).exists():
            raise UserError(
                f"answer_targets top_logprobs: {folder} has no {name}: generate the answers with "
                "--top-logprobs 20, or leave answer_targets out"
            )


def _answers(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, list[Row]]]:
    """The answers as documents, each with what the teacher said of its tokens."""
    scored = {row["id"]: row["tokens"] or [] for row in _rows_of(folder / TOP_LOGPROBS)}
    rows = [row for row in _rows_of(folder / ANSWERS) if scored.get(row["id"])]
    for at in range(0, len(rows), TOKENIZED_AT_ONCE):
        part = rows[at : at + TOKENIZED_AT_ONCE]
        passages = [read_row(row, f"{folder / ANSWERS}, answer {row['id']}") for row in part]
        for row, document in zip(part, tokenize(passages, tokenizer), strict=True):
            yield document, scored[row["id"]]


def _rows_of(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8") as file:
            rows: list[Row] = [json.loads(line) for line in file]
    except ValueError as error:
        raise UserError(f"{path} is broken ({error}): generate the answers again") from None
    return rows


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
