"""Packing, against a version that goes token by token."""

from __future__ import annotations

import hashlib
import random
from itertools import pairwise

import numpy as np
import torch

from regrow.data.documents import Document
from regrow.data.sequences import Blocks, Packer

LENGTH, PAD = 8, 9


def slow(documents: list[Document]) -> list[list[tuple[int, int, int]]]:
    """Full blocks of (id, position, label), one token after the other."""
    blocks: list[list[tuple[int, int, int]]] = [[]]
    for document in documents:
        position = 0
        for token, scored in zip(document.ids, document.scored, strict=True):
            if len(blocks[-1]) == LENGTH:
                blocks.append([])
                position = 0
            label = token if scored and position > 0 else -100
            blocks[-1].append((token, position, label))
            position += 1
    return [block for block in blocks if len(block) == LENGTH]


def pack(documents: list[Document], num_blocks: int = 10**6) -> Blocks:
    packer = Packer(LENGTH, PAD)
    for document in documents:
        packer.add(document)
    assert packer.documents == len(documents)
    assert packer.tokens == sum(len(document.ids) for document in documents)
    return packer.blocks(num_blocks)


def some_documents(seed: int, count: int = 60) -> list[Document]:
    dice = random.Random(seed)
    sizes = [dice.choice([0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 40]) for _ in range(count)]
    return [
        Document(
            [dice.randrange(10, 90) for _ in range(size)],
            [dice.random() < 0.7 for _ in range(size)],
        )
        for size in sizes
    ]


def test_by_hand() -> None:
    yes, no = True, False
    blocks = pack(
        [
            Document([11, 12, 13], [no, yes, yes]),
            Document([21, 22, 23, 24, 25, 26, 27, 28, 29, 20], [yes] * 10),
            Document([31, 32, 33, 34], [yes, no, no, yes]),
        ]
    )
    assert blocks.input_ids.tolist() == [
        [11, 12, 13, 21, 22, 23, 24, 25],
        [26, 27, 28, 29, 20, 31, 32, 33],
    ]
    assert blocks.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert blocks.labels.tolist() == [
        [-100, 12, 13, -100, 22, 23, 24, 25],
        [-100, 27, 28, 29, 20, -100, -100, -100],
    ]
    assert blocks.real.all()
    assert (blocks.num_documents, blocks.scored_tokens) == (4, 10)


def test_equals_the_slow_version() -> None:
    for seed in range(20):
        documents = some_documents(seed)
        expected = np.array(slow(documents))
        blocks = pack(documents)
        assert blocks.input_ids.tolist() == expected[..., 0].tolist()
        assert blocks.position_ids.tolist() == expected[..., 1].tolist()
        assert blocks.labels.tolist() == expected[..., 2].tolist()
        assert blocks.real.all()
        assert (blocks.labels[:, 0] == -100).all()
        assert blocks.num_documents == (expected[..., 1] == 0).sum()
        assert blocks.scored_tokens == (expected[..., 2] != -100).sum()


def test_the_only_block_is_padded() -> None:
    blocks = pack([Document([11, 12, 13], [True] * 3), Document([21, 22], [False, True])])
    assert blocks.input_ids.tolist() == [[11, 12, 13, 21, 22, PAD, PAD, PAD]]
    assert blocks.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert blocks.labels.tolist() == [[-100, 12, 13, -100, 22, -100, -100, -100]]
    assert blocks.real.tolist() == [[True] * 5 + [False] * 3]
    assert (blocks.num_documents, blocks.scored_tokens) == (2, 3)


def test_an_incomplete_block_after_a_full_one_is_dropped() -> None:
    blocks = pack([Document(list(range(11, 22)), [True] * 11)])
    assert blocks.input_ids.tolist() == [list(range(11, 19))]


def test_scored_only_leaves_out_prompts_that_predict_nothing() -> None:
    no, yes = False, True
    packer = Packer(LENGTH, PAD, scored_only=True)
    packer.add(Document([11, 12, 13], [no, yes, yes]))
    # Five places are left: the last five tokens, which end with the answer.
    packer.add(Document(list(range(21, 41)), [no] * 19 + [yes]))
    # Two answers far apart: half of the room before the first, all that follows the last goes.
    ids = list(range(50, 90))
    packer.add(Document(ids, [token in (62, 79) for token in ids]))
    packer.add(Document([91, 92, 93], [no] * 3))
    packer.add(Document([94, 95, 96], [no, no, yes]))
    blocks = packer.blocks(9)
    assert blocks.input_ids.tolist() == [
        [11, 12, 13, 36, 37, 38, 39, 40],
        [58, 59, 60, 61, 62, 63, 64, 65],
        [75, 76, 77, 78, 79, 80, 81, 82],
    ]
    assert packer.block[0, : packer.used].tolist() == [94, 95, 96]
    assert [row[row != -100].tolist() for row in blocks.labels] == [[12, 13, 40], [62], [79]]


def test_scored_only_scores_something_in_every_piece() -> None:
    for seed in range(20):
        documents = some_documents(seed)
        packer = Packer(LENGTH, PAD, scored_only=True)
        for document in documents:
            packer.add(document)
        blocks = packer.blocks(10**6)
        plain = pack(documents)
        share = blocks.scored_tokens / blocks.labels.numel()
        assert share >= plain.scored_tokens / plain.labels.numel()
        for ids, labels in zip(blocks.position_ids, blocks.labels, strict=True):
            starts = [*(ids == 0).nonzero().flatten().tolist(), LENGTH]
            for begin, end in pairwise(starts):  # one place left over can score nothing
                assert end - begin < 2 or (labels[begin:end] != -100).any()


def test_nothing_gives_no_blocks() -> None:
    blocks = pack([])
    assert blocks.input_ids.shape == (0, LENGTH)
    assert (len(blocks), blocks.num_documents, blocks.scored_tokens) == (0, 0, 0)


def test_asking_for_fewer_gives_the_first() -> None:
    documents = some_documents(3)
    assert pack(documents, 5).input_ids.tolist() == pack(documents).input_ids[:5].tolist()


def test_items_batches_selection() -> None:
    blocks = pack(some_documents(1))
    count = len(blocks)
    assert count % 4 != 0
    assert {name: t.dtype for name, t in blocks[0].items()} == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "labels": torch.int64,
        "real": torch.bool,
    }
    batches = list(blocks.batches(4))
    assert [len(batch["labels"]) for batch in batches] == [4] * (count // 4) + [count % 4]
    for name in blocks[0]:
        whole = torch.cat([batch[name] for batch in batches])
        assert torch.equal(whole, torch.stack([blocks[n][name] for n in range(count)]))
    part = blocks.select(range(6, 0, -2))
    assert part.labels.tolist() == blocks.labels[[6, 4, 2]].tolist()
    assert part.scored_tokens == (blocks.labels[[6, 4, 2]] != -100).sum()
    assert len(blocks.select(range(0))) == 0


def test_fingerprint_sees_every_tensor() -> None:
    blocks = pack(some_documents(2))
    tensors = (blocks.input_ids, blocks.position_ids, blocks.labels, blocks.real)
    expected = hashlib.sha256(str((len(blocks), LENGTH)).encode())
    for tensor in tensors:
        expected.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    assert blocks.fingerprint == expected.hexdigest()
    seen = {blocks.fingerprint, blocks.select(range(3)).fingerprint}
    for changed in range(4):
        copies = [tensor.clone() for tensor in tensors]
        copies[changed][1, 2] = 5 if changed < 3 else False
        seen.add(Blocks(*copies).fingerprint)
    assert len(seen) == 6
