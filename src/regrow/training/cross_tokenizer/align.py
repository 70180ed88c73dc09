"""Tokenizes a text with two tokenizers, and finds the text spans whose boundaries both share.

Shapes: B sequences, T tokens of the student, U tokens of the teacher.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow.data.documents import prefix_ids
from regrow.data.sequences import IGNORED, Sequences
from regrow.errors import UserError

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


SPACE = "▁"


def token_bytes(tokenizer: PreTrainedTokenizerBase, name: str) -> list[bytes | None]:
    """The bytes of each token id; None for special tokens and for ids without a token.

    A byte-level vocabulary spells each byte as one of 256 characters. Other vocabularies are text
    in which ▁ represents a space and <0xAB> a byte. Raises UserError, which names the model, for
    any other spelling.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{name} has only a slow tokenizer: spans need a tokenizer.json")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = list(_flat(rules["decoder"]))
    kinds = {step["type"] for step in steps}
    spaced = "Metaspace" in kinds or any(
        step["type"] == "Replace" and step["pattern"] == {"String": SPACE} for step in steps
    )
    if "ByteLevel" not in kinds and not spaced:
        raise UserError(
            f"{name} has a tokenizer whose tokens cannot be mapped to bytes (decoder: "
            f"{', '.join(sorted(kinds)) or 'none'}): spans need a byte-level or SentencePiece one"
        )
    byte_of = _byte_level() if "ByteLevel" in kinds else None
    added = {token["content"]: token["special"] for token in rules["added_tokens"]}
    vocab = tokenizer.get_vocab()
    bytes_of: list[bytes | None] = [None] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if token in added:
            bytes_of[i] = None if added[token] else token.encode()
        elif byte_of is not None:
            bytes_of[i] = b"".join(byte_of.get(c, c.encode()) for c in token)
        else:
            byte = BYTE.fullmatch(token) if "ByteFallback" in kinds else None
            text = token.replace(SPACE, " ").encode()
            bytes_of[i] = bytes.fromhex(byte[1]) if byte else text
    return bytes_of


def _flat(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat(inner)]


def _byte_level() -> dict[str, bytes]:
    """The byte that each character represents in GPT-2's spelling (Radford et al., 2019).

    Printable bytes are spelled as themselves; the others, in order, as the characters from 256 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in plain]
    spelled = {chr(value): bytes([value]) for value in plain}
    return spelled | {chr(256 + n): bytes([value]) for n, value in enumerate(others)}


ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


class Span(NamedTuple):
    """A shortest common span, as the range (begin, end) of its tokens in both tokenizations."""

    student: tuple[int, int]
    teacher: tuple[int, int]


@dataclass
class Tokens:
    """The tokens of all spans, in order, each with the number of its span."""

    at: list[int] = field(default_factory=list)
    """The predicting position of each token, in [B · (T − 1)]."""
    target: list[int] = field(default_factory=list)
    span: list[int] = field(default_factory=list)

    def add(self, row: int, width: int, places: range, ids: list[int], span: int) -> None:
        """Add the tokens `ids` at `places` of a row of `width` tokens."""
        self.at += [row * (width - 1) + place - 1 for place in places]
        self.target += ids
        self.span += [span] * len(ids)


class Aligned(NamedTuple):
    """A batch in the teacher's tokens, and the tokens of both models to compare."""

    batch: dict[str, Tensor]
    """input_ids and position_ids [B, U]."""
    student: Tokens
    teacher: Tokens
    spans: int


class Aligner:
    """Retokenizes the documents of packed sequences for a teacher with another tokenizer.

    Raises UserError for tokenizers whose tokens cannot be mapped to bytes.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        names: tuple[str, str] = ("the student", "the teacher"),
    ) -> None:
        self.student, self.teacher = student, teacher
        self.student_bytes = token_bytes(student, names[0])
        self.teacher_bytes = token_bytes(teacher, names[1])
        self.special = _specials(student, self.student_bytes, teacher, self.teacher_bytes)
        self.prefix = prefix_ids(teacher)
        """The tokens that the teacher's tokenizer puts before any text."""
        self.student_spaced = _spaced(student, self.student_bytes)
        self.teacher_spaced = _spaced(teacher, self.teacher_bytes)

    def check_specials(self, sequences: Sequences) -> None:
        """Raise UserError for a special token in these sequences that the teacher lacks."""
        ignored = {self.student.bos_token_id, self.student.pad_token_id, self.student.unk_token_id}
        for i in sequences.ids_used().tolist():
            if self.student_bytes[i] is None and i not in self.special and i not in ignored:
                token = self.student.convert_ids_to_tokens(i)
                raise UserError(
                    f"the text has the special token {token!r}, which the teacher's tokenizer "
                    "lacks: spans need text without it, such as plain text instead of chats"
                )

    def coverage(self, sequences: Sequences) -> float:
        """The share of the scored tokens that are in spans; raises UserError if it is 0."""
        inside = sum(len(self.batch(batch).student.at) for batch in sequences.batches(16))
        if not inside:
            raise UserError("both tokenizers change all of the text: spans cannot be compared")
        return inside / sequences.scored_tokens

    def batch(self, batch: dict[str, Tensor]) -> Aligned:
        """Convert a batch of packed sequences to the teacher's tokens.

        A span counts if all of the student's tokens in it are scored, and both models have a token
        before it to predict it from. A document is left out if the teacher's tokenizer changes its
        bytes, for example by normalization.
        """
        rows: list[tuple[list[int], list[int]]] = []
        documents: list[tuple[int, int, int, list[int], list[int], list[Span]]] = []
        ids_BT, labels_BT = batch["input_ids"].tolist(), batch["labels"].tolist()
        for row, positions in enumerate(batch["position_ids"].tolist()):
            ids: list[int] = []
            places: list[int] = []
            for begin, end in _documents(positions):
                scored = [label != IGNORED for label in labels_BT[row][begin:end]]
                aligned = self.align(ids_BT[row][begin:end]) if any(scored) else None
                if aligned is None:
                    continue
                teacher_ids, spans = aligned
                spans = [s for s in spans if min(s.student[0], s.teacher[0]) > 0]
                spans = [s for s in spans if all(scored[s.student[0] : s.student[1]])]
                student_ids = ids_BT[row][begin:end]
                documents.append((row, begin, len(ids), student_ids, teacher_ids, spans))
                ids, places = ids + teacher_ids, places + list(range(len(teacher_ids)))
            rows.append((ids, places))
        width = max(2, *(len(ids) for ids, _ in rows))
        student, teacher, count = Tokens(), Tokens(), 0
        for row, begin, start, student_ids, teacher_ids, spans in documents:
            for (a, b), (c, d) in spans:
                length = batch["input_ids"].shape[1]
                student.add(row, length, range(begin + a, begin + b), student_ids[a:b], count)
                teacher.add(row, width, range(start + c, start + d), teacher_ids[c:d], count)
                count += 1
        return Aligned(_padded(rows, width), student, teacher, count)

    def align(self, ids: list[int]) -> tuple[list[int], list[Span]] | None:
        """A document's ids in the teacher's vocabulary, and its spans; None if its bytes change."""
        teacher_ids, student_ends, teacher_ends = list(self.prefix), list[int](), list[int]()
        at, begin, first = 0, 0, True
        for special, run in _runs(ids, self.student_bytes):
            if special:
                (token,) = run
                if first and token == self.student.bos_token_id:  # the teacher has its own, or none
                    student_ends.append(0)
                    continue
                if token not in self.special:
                    return None
                teacher_ids.append(self.special[token])
                at += 1
                student_ends.append(at)
                teacher_ends.append(at)
            else:
                last = len(student_ends) + len(run) == len(ids)
                aligned = self._run(run, first, last)
                if aligned is None:
                    return None
                student_lengths, skipped, tokens, teacher_lengths = aligned
                begin += skipped
                student_ends += _ends(at, student_lengths)
                teacher_ends += _ends(at + skipped, teacher_lengths)
                teacher_ids += tokens
                at += sum(student_lengths)
            first = False
        teacher_ends = [begin] * len(self.prefix) + teacher_ends
        return teacher_ids, _spans(student_ends, teacher_ends, begin)

    def _run(
        self, run: list[int], first: bool, last: bool
    ) -> tuple[list[int], int, list[int], list[int]] | None:
        """Align a run of text between special tokens; None if its bytes change.

        Returns the byte lengths of the student's tokens, the number of bytes before the teacher's
        tokens, the teacher's ids and their byte lengths. A sequence may begin or end inside a
        character, whose bytes are then in no span.
        """
        parts = [part for i in run if (part := self.student_bytes[i]) is not None]
        lengths, data = list(map(len, parts)), b"".join(parts)
        if first and self.student_spaced and data.startswith(b" "):
            lengths[0], data = lengths[0] - 1, data[1:]
        skipped = next((n for n, byte in enumerate(data) if byte >> 6 != 0b10), len(data))
        text = data[skipped:].decode("utf-8", "ignore")
        known = text.encode()
        cut = len(data) - skipped - len(known)
        if (skipped and not first) or (cut and not last) or cut > 3 or skipped > 3:
            return None
        if known != data[skipped : len(data) - cut]:
            return None
        ids: list[int] = self.teacher(text, add_special_tokens=False)["input_ids"]
        pieces = [piece for i in ids if (piece := self.teacher_bytes[i]) is not None]
        if len(pieces) < len(ids):
            return None
        teacher_lengths, back = list(map(len, pieces)), b"".join(pieces)
        if self.teacher_spaced and back == b" " + known:
            teacher_lengths[0] -= 1
        elif back != known:
            return None
        return lengths, skipped, ids, teacher_lengths


def _specials(
    student: PreTrainedTokenizerBase,
    student_bytes: list[bytes | None],
    teacher: PreTrainedTokenizerBase,
    teacher_bytes: list[bytes | None],
) -> dict[int, int]:
    """The teacher's id of each special token; tokens are matched by string, else by role."""
    names = teacher.get_vocab()
    ids = {
        i: names[token]
        for token, i in student.get_vocab().items()
        if student_bytes[i] is None and token in names and teacher_bytes[names[token]] is None
    }
    for role in ROLES:
        one, other = getattr(student, role), getattr(teacher, role)
        if one is not None and other is not None:
            ids.setdefault(one, other)
    ids.pop(student.unk_token_id, None)  # the text behind an unknown token is not known
    return ids


def _spaced(tokenizer: PreTrainedTokenizerBase, bytes_of: list[bytes | None]) -> bool:
    """Whether the tokenizer puts a space before any text."""
    first: int = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    return (bytes_of[first] or b"").startswith(b" ")


def _documents(positions: list[int]) -> Iterator[tuple[int, int]]:
    starts = [n for n, position in enumerate(positions) if position == 0 or n == 0]
    yield from zip(starts, [*starts[1:], len(positions)], strict=True)


def _runs(ids: list[int], bytes_of: list[bytes | None]) -> Iterator[tuple[bool, list[int]]]:
    """Split ids into (True, [special token]) and (False, run of other tokens), in order."""
    run: list[int] = []
    for i in ids:
        if bytes_of[i] is None:
            if run:
                yield False, run
            yield True, [i]
            run = []
        else:
            run.append(i)
    if run:
        yield False, run


def _ends(start: int, lengths: list[int]) -> list[int]:
    return [start + end for end in accumulate(lengths)]


def _spans(student_ends: list[int], teacher_ends: list[int], begin: int) -> list[Span]:
    """The spans between common token boundaries; the teacher's tokens begin at byte `begin`."""
    student = {0: 0, **{end: n for n, end in enumerate(student_ends, start=1)}}
    teacher = {begin: 0, **{end: n for n, end in enumerate(teacher_ends, start=1)}}
    common = sorted(student.keys() & teacher.keys())
    return [Span((student[a], student[b]), (teacher[a], teacher[b])) for a, b in pairwise(common)]


def _padded(rows: list[tuple[list[int], list[int]]], width: int) -> dict[str, Tensor]:
    """Pad the rows to the same width; the padding is a separate document."""
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    for row, (tokens, places) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        positions[row, : len(tokens)] = torch.tensor(places, dtype=torch.int64)
        positions[row, len(tokens) :] = torch.arange(width - len(tokens))
    return {"input_ids": ids, "position_ids": positions}
