"""Packing, against a version that goes token by token."""

from __future__ import annotations

import hashlib
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from regrow.data import sequences, stack
from regrow.data.documents import Document
from regrow.data.sequences import OPEN, Packer, Sequences

LENGTH, PAD = 8, 9
PREFIXES = ([], [5], [5, 6])
"""Tokens that a tokenizer puts before any text: none, BOS, or two."""


def slow(documents: list[Document], prefix: list[int]) -> list[list[tuple[int, int, int]]]:
    """Sequences of (id, position, label), one token after the other.

    A document whose tokens after the prefix are not all scored stays in one sequence if it can. At
    the end, sequences with such a document are padded, and one without is dropped.
    """
    kept: list[list[tuple[int, int, int]]] = []
    waiting: list[list[tuple[int, int, int]]] = []
    full: list[list[tuple[int, int, int]]] = []

    def fullest(room: int) -> list[tuple[int, int, int]]:
        fitting = [row for row in waiting if len(row) + room <= LENGTH]
        if not fitting:
            waiting.append([])
            return waiting[-1]
        return next(row for row in fitting if len(row) == max(map(len, fitting)))

    def finish(row: list[tuple[int, int, int]]) -> None:
        waiting[:] = [other for other in waiting if other is not row]
        full.append(row + [(PAD, place, -100) for place in range(LENGTH - len(row))])

    for document in documents:
        whole = not all(document.scored[len(prefix) :]) and len(document.ids) <= LENGTH
        row = fullest(len(document.ids) if whole else 1)
        position = number = 0
        while number < len(document.ids):
            within = False
            if len(row) == LENGTH:
                finish(row)
                number = 0 if number <= len(prefix) else number
                within, position = number > 0, 0
                row = fullest(len(prefix) + 1 if within else 1)
                for token in prefix * within:
                    row.append((token, position, -100))
                    position += 1
            token = document.ids[number]
            scored = document.scored[number] and position > 0 and not within
            row.append((token, position, token if scored else -100))
            position, number = position + 1, number + 1
        kept += [row] * whole
        if len(row) == LENGTH:
            finish(row)
        elif whole and len(waiting) > OPEN:
            finish(fullest(1))
    for row in sorted(waiting, key=len, reverse=True):
        if any(row is other for other in kept):
            finish(row)
    return full


def pack(
    documents: list[Document], num_sequences: int = 10**6, prefix: list[int] | None = None
) -> Sequences:
    packer = Packer(LENGTH, PAD, prefix=prefix or [])
    for document in documents:
        packer.add(document)
    assert packer.documents == len(documents)
    assert packer.tokens == sum(len(document.ids) for document in documents)
    return packer.sequences(num_sequences)


def some_documents(seed: int, count: int = 60, prefix: list[int] | None = None) -> list[Document]:
    dice, prefix = random.Random(seed), prefix or []
    sizes = [dice.choice([0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 40]) for _ in range(count)]
    return [
        Document(
            prefix + [dice.randrange(10, 90) for _ in range(size)],
            [False] * len(prefix) + [dice.random() < 0.7 for _ in range(size)],
        )
        for size in sizes
    ]


def test_packing_equals_a_hand_made_example() -> None:
    yes, no = True, False
    sequences = pack(
        [
            Document([11, 12, 13], [no, yes, yes]),
            Document([21, 22, 23, 24, 25, 26, 27, 28, 29, 20], [yes] * 10),
            Document([31, 32, 33, 34], [yes] * 4),
        ]
    )
    assert sequences.input_ids.tolist() == [
        [11, 12, 13, 21, 22, 23, 24, 25],
        [26, 27, 28, 29, 20, 31, 32, 33],
    ]
    assert sequences.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert sequences.labels.tolist() == [
        [-100, 12, 13, -100, 22, 23, 24, 25],
        [-100, 27, 28, 29, 20, -100, 32, 33],
    ]
    assert sequences.real.all()
    assert (sequences.num_documents, sequences.scored_tokens) == (4, 12)


def test_packing_with_bos_equals_a_hand_made_example() -> None:
    no, yes = False, True
    documents = [
        Document([5, 11, 12, 13, 14, 15], [no, yes, yes, yes, yes, yes]),
        Document([5, *range(21, 31)], [no] + [yes] * 10),
        Document([5, 41, 42], [no, yes, yes]),
        Document([5, 51, 52, 53, 54], [no, yes, yes, yes, yes]),
    ]
    sequences = pack(documents, prefix=[5])
    assert sequences.input_ids.tolist() == [
        [5, 11, 12, 13, 14, 15, 5, 21],
        [5, 22, 23, 24, 25, 26, 27, 28],
        [5, 29, 30, 5, 41, 42, 5, 51],
    ]
    assert sequences.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 0, 1],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 0, 1, 2, 0, 1],
    ]
    assert sequences.labels.tolist() == [
        [-100, 11, 12, 13, 14, 15, -100, 21],
        [-100, -100, 23, 24, 25, 26, 27, 28],
        [-100, -100, 30, -100, 41, 42, -100, 51],
    ]
    # Where only BOS fits, the document begins in the next sequence, and its first token is scored.
    late = [Document([5, *range(11, 17)], [no] + [yes] * 6), Document([5, 21, 22], [no, yes, yes])]
    late.append(Document([5, *range(31, 36)], [no] + [yes] * 5))
    sequences = pack(late, prefix=[5])
    assert sequences.input_ids.tolist() == [
        [5, 11, 12, 13, 14, 15, 16, 5],
        [5, 21, 22, 5, 31, 32, 33, 34],
    ]
    assert sequences.labels.tolist()[1] == [-100, 21, 22, -100, 31, 32, 33, 34]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_packing_equals_the_slow_version(prefix: list[int]) -> None:
    for seed in range(20):
        documents = some_documents(seed, prefix=prefix)
        expected = np.array(slow(documents, prefix))
        sequences = pack(documents, prefix=prefix)
        assert sequences.input_ids.tolist() == expected[..., 0].tolist()
        assert sequences.position_ids.tolist() == expected[..., 1].tolist()
        assert sequences.labels.tolist() == expected[..., 2].tolist()
        assert sequences.real.tolist() == (expected[..., 0] != PAD).tolist()
        assert (sequences.labels[:, 0] == -100).all()
        starts = (expected[..., 1] == 0) & (expected[..., 0] != PAD)
        assert sequences.num_documents == starts.sum()
        assert sequences.scored_tokens == (expected[..., 2] != -100).sum()
        for sequence in sequences.input_ids:
            assert sequence[: len(prefix)].tolist() == prefix
        assert not torch.isin(sequences.labels, torch.tensor(prefix, dtype=torch.int64)).any()


def test_a_prompt_and_its_answer_stay_together() -> None:
    """Best fit: each goes to the fullest sequence with room, and plain text fills the rest."""
    no, yes = False, True

    def turn(first: int, size: int) -> Document:
        return Document([*range(first, first + size)], [no] + [yes] * (size - 1))

    # 5 + 3, 6 + 2, and 4 with text; the last text continues in a sequence that is dropped.
    documents = [turn(11, 5), turn(21, 6), turn(31, 4), turn(41, 3), turn(51, 2)]
    documents.append(Document([*range(61, 67)], [yes] * 6))
    assert pack(documents).input_ids.tolist() == [
        [11, 12, 13, 14, 15, 41, 42, 43],
        [21, 22, 23, 24, 25, 26, 51, 52],
        [31, 32, 33, 34, 61, 62, 63, 64],
    ]
    # More than OPEN sequences wait: the fullest is padded, and the others follow it at the end.
    sizes = [5, 6, *[5] * (OPEN - 1)]
    found = pack([turn(11, size) for size in sizes])
    assert found.real.sum(-1).tolist() == [6] + [5] * OPEN
    assert found.scored_tokens == sum(sizes) - len(sizes)


def test_the_only_sequence_is_padded() -> None:
    sequences = pack([Document([11, 12, 13], [True] * 3), Document([21, 22], [False, True])])
    assert sequences.input_ids.tolist() == [[11, 12, 13, 21, 22, PAD, PAD, PAD]]
    assert sequences.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert sequences.labels.tolist() == [[-100, 12, 13, -100, 22, -100, -100, -100]]
    assert sequences.real.tolist() == [[True] * 5 + [False] * 3]
    assert (sequences.num_documents, sequences.scored_tokens) == (2, 3)


def test_an_incomplete_sequence_after_a_full_one_is_dropped() -> None:
    sequences = pack([Document(list(range(11, 22)), [True] * 11)])
    assert sequences.input_ids.tolist() == [list(range(11, 19))]


def test_scored_only_leaves_out_prompts_that_predict_nothing() -> None:
    no, yes = False, True
    packer = Packer(LENGTH, PAD, scored_only=True)
    packer.add(Document([11, 12, 13], [no, yes, yes]))
    # Five places are left: the last five tokens, which end with the answer.
    packer.add(Document(list(range(21, 41)), [no] * 19 + [yes]))
    # Two answers far apart: half of the room is before the first, and the last one ends the text.
    ids = list(range(50, 90))
    packer.add(Document(ids, [token in (62, 79) for token in ids]))
    packer.add(Document([91, 92, 93], [no] * 3))
    packer.add(Document([94, 95, 96], [no, no, yes]))
    sequences = packer.sequences(3)
    assert sequences.input_ids.tolist() == [
        [11, 12, 13, 36, 37, 38, 39, 40],
        [58, 59, 60, 61, 62, 63, 64, 65],
        [72, 73, 74, 75, 76, 77, 78, 79],
    ]
    assert [row[row != -100].tolist() for row in sequences.labels] == [[12, 13, 40], [62], [79]]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_scored_only_scores_something_in_every_piece(prefix: list[int]) -> None:
    for seed in range(20):
        documents = some_documents(seed, prefix=prefix)
        packer = Packer(LENGTH, PAD, scored_only=True, prefix=prefix)
        for document in documents:
            packer.add(document)
        sequences = packer.sequences(10**6)
        plain = pack(documents, prefix=prefix)
        share = sequences.scored_tokens / sequences.labels.numel()
        assert share >= plain.scored_tokens / plain.labels.numel()
        for row, (places, labels) in enumerate(
            zip(sequences.position_ids, sequences.labels, strict=True)
        ):
            used = int(sequences.real[row].sum())
            starts = [*(places[:used] == 0).nonzero().flatten().tolist(), used]
            for begin, end in pairwise(starts):  # a rest of the row can be too short to score
                begin_ids = sequences.input_ids[row, begin:end][: len(prefix)].tolist()
                assert begin_ids == prefix[: end - begin]
                too_short = end == LENGTH and end - begin < 2 + len(prefix)
                assert too_short or (labels[begin:end] != -100).any()


def test_no_document_gives_no_sequence() -> None:
    sequences = pack([])
    assert sequences.input_ids.shape == (0, LENGTH)
    assert (len(sequences), sequences.num_documents, sequences.scored_tokens) == (0, 0, 0)


def test_fewer_sequences_are_the_first_ones() -> None:
    documents = some_documents(3)
    assert pack(documents, 5).input_ids.tolist() == pack(documents).input_ids[:5].tolist()


def test_items_batches_and_selections_agree() -> None:
    sequences = pack(some_documents(1))
    count = len(sequences)
    assert count % 4 != 0
    assert {name: t.dtype for name, t in sequences[0].items()} == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "labels": torch.int64,
        "real": torch.bool,
    }
    batches = list(sequences.batches(4))
    assert [len(batch["labels"]) for batch in batches] == [4] * (count // 4) + [count % 4]
    for name in sequences[0]:
        joined = torch.cat([batch[name] for batch in batches])
        assert torch.equal(joined, torch.stack([sequences[n][name] for n in range(count)]))
    part = sequences.select(range(6, 0, -2))
    assert part.labels.tolist() == sequences.labels[[6, 4, 2]].tolist()
    assert part.scored_tokens == (sequences.labels[[6, 4, 2]] != -100).sum()
    assert len(sequences.select(range(0))) == 0


def test_the_fingerprint_depends_on_every_tensor() -> None:
    sequences = pack(some_documents(2))
    tensors = (sequences.input_ids, sequences.position_ids, sequences.labels, sequences.real)
    expected = hashlib.sha256(str((len(sequences), LENGTH)).encode())
    for tensor in tensors:
        expected.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    assert sequences.fingerprint == expected.hexdigest()
    fingerprints = {sequences.fingerprint, sequences.select(range(3)).fingerprint}
    for changed in range(4):
        copies = [tensor.clone() for tensor in tensors]
        copies[changed][1, 2] = 5 if changed < 3 else False
        fingerprints.add(Sequences(*copies).fingerprint)
    assert len(fingerprints) == 6


def test_a_document_in_each_sequence() -> None:
    """Against a version that cuts each document into pieces, and pads them."""
    for seed, prefix in enumerate(PREFIXES):
        documents = some_documents(seed, prefix=prefix)
        packer = Packer(LENGTH, PAD, prefix=prefix, alone=True)
        for document in documents:
            packer.add(document)
        found = packer.sequences(10**6)
        wanted = [
            rows + [(PAD, len(rows) + n, -100) for n in range(LENGTH - len(rows))]
            for document in documents
            for rows in pieces(document, prefix)
            if any(label != -100 for _, _, label in rows) or len(rows) == LENGTH
        ]
        rows = [
            list(zip(*row, strict=True))
            for row in zip(
                found.input_ids.tolist(),
                found.position_ids.tolist(),
                found.labels.tolist(),
                strict=True,
            )
        ]
        assert rows == wanted
        assert found.num_documents == len(found)
        assert bool((found.labels[~found.real] == -100).all()) and not bool(found.real.all())


def pieces(document: Document, prefix: list[int]) -> list[list[tuple[int, int, int]]]:
    """The parts of one document, each of at most LENGTH tokens and after the first with prefix."""
    parts, start, ids = [], 0, document.ids
    while start < len(ids):
        head = prefix if start else []
        end = min(len(ids), start + LENGTH - len(head))
        rows = [(token, place, -100) for place, token in enumerate(head)]
        for number in range(start, end):
            place = len(head) + number - start
            scored = document.scored[number] and number > start
            rows.append((ids[number], place, ids[number] if scored else -100))
        parts.append(rows)
        start = end
    return parts


@pytest.mark.parametrize("tagged", [False, True])
def test_a_long_text_is_kept_in_a_file_and_is_the_same(
    tagged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [
        Document(list(range(n, n + 3 + n % 11)), [n % 3 > 0] * (3 + n % 11), n % 2)
        for n in range(300)
    ]

    def packed() -> Sequences:
        packer = Packer(LENGTH, PAD, scored_only=True, tagged=tagged)
        for document in documents:
            packer.add(document)
        return packer.sequences(200)

    short = packed()
    monkeypatch.setattr(stack, "IN_MEMORY", 10 * 4 * LENGTH)
    mapped: list[object] = []
    made = stack.Stack.stacked

    def noted(self: stack.Stack, count: int) -> Any:
        mapped.append(made(self, count))
        return mapped[-1]

    monkeypatch.setattr(stack.Stack, "stacked", noted)
    long = packed()
    assert isinstance(mapped[0], np.memmap)
    assert long.fingerprint == short.fingerprint
    monkeypatch.setattr(sequences, "PART_TOKENS", 3 * LENGTH)
    assert long.fingerprint == short.fingerprint
    assert long.num_documents == short.num_documents > 200
    assert long.scored_tokens == short.scored_tokens
    assert torch.equal(long.ids_used(), short.input_ids.unique())
    for one, other in zip(long.batches(7), short.batches(7), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert {tensor.dtype for tensor in one.values()} == {torch.int64, torch.bool}
