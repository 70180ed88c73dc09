"""The same text in the tokens of two tokenizers, and the bytes at which tokens of both end.

Shapes: B blocks, T tokens of the student, U tokens of the teacher.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow.data.sequences import IGNORED, Sequences
from regrow.errors import UserError

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


SPACE = "▁"


def token_bytes(tokenizer: PreTrainedTokenizerBase, name: str) -> list[bytes | None]:
    """The bytes of each token id; None for special tokens and for ids without a token.

    Byte-level tokens are spelled in 256 characters that stand for bytes; others in text, with ▁
    for a space and <0xAB> for a byte. Raises UserError, naming the model, for another spelling.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{name} has a slow tokenizer only: spans need a tokenizer.json")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = list(_flat(rules["decoder"]))
    kinds = {step["type"] for step in steps}
    spaced = "Metaspace" in kinds or any(
        step["type"] == "Replace" and step["pattern"] == {"String": SPACE} for step in steps
    )
    if "ByteLevel" not in kinds and not spaced:
        raise UserError(
            f"{name} has a tokenizer whose tokens do not say their bytes (decoder: "
            f"{', '.join(sorted(kinds)) or 'none'}): spans need a byte-level or SentencePiece one"
        )
    byte_of = _byte_level() if "ByteLevel" in kinds else None
    added = {token["content"]: token["special"] for token in rules["added_tokens"]}
    vocab = tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if token in added:
            found[i] = None if added[token] else token.encode()
        elif byte_of is not None:
            found[i] = b"".join(byte_of.get(c, c.encode()) for c in token)
        else:
            byte = BYTE.fullmatch(token) if "ByteFallback" in kinds else None
            text = token.replace(SPACE, " ").encode()
            found[i] = bytes.fromhex(byte[1]) if byte else text
    return found


def _flat(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat(inner)]


def _byte_level() -> dict[str, bytes]:
    """The byte of each character in GPT-2's spelling: printable ones are themselves.

    The others, in order, are the characters from 256 on (Radford et al., 2019).
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in plain]
    spelled = {chr(value): bytes([value]) for value in plain}
    return spelled | {chr(256 + n): bytes([value]) for n, value in enumerate(others)}


ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


class Span(NamedTuple):
    """The shortest run of bytes at whose ends tokens of both end: first and last + 1 of each."""

    student: tuple[int, int]
    teacher: tuple[int, int]


@dataclass
class Tokens:
    """Tokens to be compared, one after the other, each with the number of its span."""

    at: list[int] = field(default_factory=list)
    """The predicting position, in [B · (T − 1)]."""
    target: list[int] = field(default_factory=list)
    span: list[int] = field(default_factory=list)

    def add(self, row: int, width: int, places: range, ids: list[int], span: int) -> None:
        """The tokens `ids` at `places` of a row `width` tokens wide."""
        self.at += [row * (width - 1) + place - 1 for place in places]
        self.target += ids
        self.span += [span] * len(ids)


class Aligned(NamedTuple):
    """A batch in the teacher's tokens, and what is compared."""

    batch: dict[str, Tensor]
    """input_ids and position_ids [B, U]."""
    student: Tokens
    teacher: Tokens
    spans: int


class Aligner:
    """Re-tokenizes the documents of packed blocks for a teacher of another tokenizer.

    Raises UserError for tokenizers whose tokens do not say their bytes.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        names: tuple[str, str] = ("the student", "the teacher"),
    ) -> None:
        self.student, self.teacher = student, teacher
        self.ours, self.theirs = token_bytes(student, names[0]), token_bytes(teacher, names[1])
        self.special = _specials(student, self.ours, teacher, self.theirs)
        bare = teacher("a", add_special_tokens=False)["input_ids"]
        whole = teacher("a")["input_ids"]
        before = next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
        self.prefix: list[int] = whole[:before]
        """What the teacher's tokenizer puts before any text."""
        self.ours_spaced = _spaced(student, self.ours)
        self.theirs_spaced = _spaced(teacher, self.theirs)

    def check_specials(self, sequences: Sequences) -> None:
        """Raise UserError for a special token in these blocks that the teacher lacks."""
        unread = {self.student.bos_token_id, self.student.pad_token_id, self.student.unk_token_id}
        for i in sequences.input_ids.unique().tolist():
            if self.ours[i] is None and i not in self.special and i not in unread:
                token = self.student.convert_ids_to_tokens(i)
                raise UserError(
                    f"the text has the special token {token!r}, which the teacher's tokenizer "
                    "lacks: spans need text without it, such as plain text instead of chats"
                )

    def coverage(self, sequences: Sequences) -> float:
        """Share of the scored tokens of these blocks that lie in spans; UserError for none."""
        inside = sum(len(self.batch(batch).student.at) for batch in sequences.batches(16))
        if not inside:
            raise UserError(
                "no text comes back unchanged from both tokenizers: spans cannot be compared"
            )
        return inside / sequences.scored_tokens

    def batch(self, batch: dict[str, Tensor]) -> Aligned:
        """A batch of packed blocks in the teacher's tokens.

        A span counts when all of the student's tokens in it are scored, and both models have a
        token before it to predict from. A document whose bytes the teacher's tokenizer does not
        give back (it normalizes them, say) is left out.
        """
        rows: list[tuple[list[int], list[int]]] = []
        found: list[tuple[int, int, int, list[int], list[int], list[Span]]] = []
        ids_BT, labels_BT = batch["input_ids"].tolist(), batch["labels"].tolist()
        for row, positions in enumerate(batch["position_ids"].tolist()):
            ids: list[int] = []
            places: list[int] = []
            for begin, end in _documents(positions):
                scored = [label != IGNORED for label in labels_BT[row][begin:end]]
                aligned = self.align(ids_BT[row][begin:end]) if any(scored) else None
                if aligned is None:
                    continue
                own, spans = aligned
                spans = [s for s in spans if min(s.student[0], s.teacher[0]) > 0]
                spans = [s for s in spans if all(scored[s.student[0] : s.student[1]])]
                found.append((row, begin, len(ids), ids_BT[row][begin:end], own, spans))
                ids, places = ids + own, places + list(range(len(own)))
            rows.append((ids, places))
        width = max(2, *(len(ids) for ids, _ in rows))
        student, teacher, count = Tokens(), Tokens(), 0
        for row, begin, start, ours, theirs, spans in found:
            for (a, b), (c, d) in spans:
                length = batch["input_ids"].shape[1]
                student.add(row, length, range(begin + a, begin + b), ours[a:b], count)
                teacher.add(row, width, range(start + c, start + d), theirs[c:d], count)
                count += 1
        return Aligned(_padded(rows, width), student, teacher, count)

    def align(self, ids: list[int]) -> tuple[list[int], list[Span]] | None:
        """A document's tokens of the teacher, and its spans; None when it does not come back."""
        theirs, ours_end, theirs_end = list(self.prefix), list[int](), list[int]()
        at, begin, first = 0, 0, True
        for special, run in _runs(ids, self.ours):
            if special:
                (token,) = run
                if first and token == self.student.bos_token_id:  # the teacher has its own, or none
                    ours_end.append(0)
                    continue
                if token not in self.special:
                    return None
                theirs.append(self.special[token])
                at += 1
                ours_end.append(at)
                theirs_end.append(at)
            else:
                last = len(ours_end) + len(run) == len(ids)
                made = self._run(run, first, last)
                if made is None:
                    return None
                own_lengths, skipped, tokens, lengths = made
                begin += skipped
                ours_end += _ends(at, own_lengths)
                theirs_end += _ends(at + skipped, lengths)
                theirs += tokens
                at += sum(own_lengths)
            first = False
        return theirs, _spans(ours_end, [begin] * len(self.prefix) + theirs_end, begin)

    def _run(
        self, run: list[int], first: bool, last: bool
    ) -> tuple[list[int], int, list[int], list[int]] | None:
        """Byte lengths of the student's tokens, bytes before the teacher's, its ids and lengths.

        A block may begin and end inside a character: those bytes belong to no span.
        """
        parts = [part for i in run if (part := self.ours[i]) is not None]
        lengths, data = list(map(len, parts)), b"".join(parts)
        if first and self.ours_spaced and data.startswith(b" "):
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
        pieces = [piece for i in ids if (piece := self.theirs[i]) is not None]
        if len(pieces) < len(ids):
            return None
        theirs, back = list(map(len, pieces)), b"".join(pieces)
        if self.theirs_spaced and back == b" " + known:
            theirs[0] -= 1
        elif back != known:
            return None
        return lengths, skipped, ids, theirs


def _specials(
    student: PreTrainedTokenizerBase,
    ours: list[bytes | None],
    teacher: PreTrainedTokenizerBase,
    theirs: list[bytes | None],
) -> dict[int, int]:
    """The teacher's id of each special token, by its string, else by its role."""
    names = teacher.get_vocab()
    found = {
        i: names[token]
        for token, i in student.get_vocab().items()
        if ours[i] is None and token in names and theirs[names[token]] is None
    }
    for role in ROLES:
        one, other = getattr(student, role), getattr(teacher, role)
        if one is not None and other is not None:
            found.setdefault(one, other)
    found.pop(student.unk_token_id, None)  # what it stands for is not known
    return found


def _spaced(tokenizer: PreTrainedTokenizerBase, spelled: list[bytes | None]) -> bool:
    """Whether a space is put before any text."""
    first: int = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    return (spelled[first] or b"").startswith(b" ")


def _documents(positions: list[int]) -> Iterator[tuple[int, int]]:
    starts = [n for n, position in enumerate(positions) if position == 0 or n == 0]
    yield from zip(starts, [*starts[1:], len(positions)], strict=True)


def _runs(ids: list[int], spelled: list[bytes | None]) -> Iterator[tuple[bool, list[int]]]:
    """Special tokens one by one, the text between them whole."""
    run: list[int] = []
    for i in ids:
        if spelled[i] is None:
            if run:
                yield False, run
            yield True, [i]
            run = []
        else:
            run.append(i)
    if run:
        yield False, run


def _ends(start: int, lengths: list[int]) -> list[int]:
    found = []
    for length in lengths:
        start += length
        found.append(start)
    return found


def _spans(ours_end: list[int], theirs_end: list[int], begin: int) -> list[Span]:
    """Between the bytes where tokens of both end; the teacher's text begins at `begin`."""
    ours = {0: 0, **{end: n for n, end in enumerate(ours_end, start=1)}}
    theirs = {begin: 0, **{end: n for n, end in enumerate(theirs_end, start=1)}}
    common = sorted(ours.keys() & theirs.keys())
    return [Span((ours[a], ours[b]), (theirs[a], theirs[b])) for a, b in pairwise(common)]


def _padded(rows: list[tuple[list[int], list[int]]], width: int) -> dict[str, Tensor]:
    """Rows of one width; what is filled up is a document of its own."""
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    for row, (own, places) in enumerate(rows):
        ids[row, : len(own)] = torch.tensor(own, dtype=torch.int64)
        positions[row, : len(own)] = torch.tensor(places, dtype=torch.int64)
        positions[row, len(own) :] = torch.arange(width - len(own))
    return {"input_ids": ids, "position_ids": positions}
