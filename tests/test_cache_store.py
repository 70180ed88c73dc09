"""Blocks found by what is in them, and a teacher read from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_cache import make_cache
from tiny_distillation import data, write_place
from tiny_folders import data_of, write_model, write_text
from tiny_tokenizer import tiny_tokenizer
from tiny_training import tiny_sequences

from regrow.checkpoint import load
from regrow.data.sequences import IGNORED, Sequences, build_sequences
from regrow.errors import UserError
from regrow.stages.cache import CacheConfig
from regrow.stages.cache.stage import header_of
from regrow.training.cache.folder import Cache, missing_sequences, sequence_keys
from regrow.training.cache.store import Store, write_shard
from regrow.training.cache.teacher import CachedTeacher, head_from
from regrow.training.head import head_of
from regrow.training.teacher import Teacher, scored


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_place(tmp_path_factory.mktemp("place"))
    make_cache(place, place / "topk", format="topk")
    make_cache(place, place / "hidden", format="hidden")
    return place


def test_the_key_of_a_sequence_depends_on_its_tokens_not_on_the_batch() -> None:
    """Its ids, positions, and which tokens are scored; not where it stands, nor the batch."""
    batch = next(tiny_sequences(4).batches(4))
    keys = sequence_keys(batch)
    assert len({len(key) for key in keys}) == 1
    assert len(set(keys)) == 4
    alone = {name: tensor[2:3] for name, tensor in batch.items()}
    assert sequence_keys(alone) == [keys[2]]
    for name in ("input_ids", "position_ids"):
        other = {**batch, name: batch[name].clone()}
        other[name][2, 3] += 1
        assert [a == b for a, b in zip(keys, sequence_keys(other), strict=True)] == [1, 1, 0, 1]
    other = {**batch, "labels": batch["labels"].clone()}
    other["labels"][2] = IGNORED
    assert [a == b for a, b in zip(keys, sequence_keys(other), strict=True)] == [1, 1, 0, 1]


def test_sequences_come_back_from_a_shard(tmp_path: Path) -> None:
    """Of different lengths each, in two files; a broken one does not count."""
    draw = torch.Generator().manual_seed(0)
    sequences = {
        bytes([n]) * 32: {
            "rows": torch.randn(n + 1, 3, generator=draw).bfloat16(),
            "stream": torch.randint(0, 255, (2 * n + 1,), generator=draw).to(torch.uint8),
            "tokens": torch.tensor([n + 1]),
        }
        for n in range(5)
    }
    keys = list(sequences)
    paths = [
        write_shard(tmp_path, {k: sequences[k] for k in subset}) for subset in (keys[:3], keys[3:])
    ]
    store = Store(tmp_path)
    assert (len(store), store.tokens()) == (5, 15)
    assert store.bytes() == sum(path.stat().st_size for path in paths)
    for key, sequence in sequences.items():
        rows = store.read(key)
        assert rows.keys() == sequence.keys()
        assert all(torch.equal(rows[name], sequence[name]) for name in sequence)
    assert b"x" * 32 not in store
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    broken = Store(tmp_path)
    assert broken.broken == [paths[0]]
    assert [key in broken for key in keys] == [False] * 3 + [True] * 2


def test_each_missing_scored_sequence_is_listed_once(tmp_path: Path) -> None:
    """Each block once, with its first number; those in which nothing is scored need no place."""
    sequences = tiny_sequences(8)  # nothing is scored in the 1st and the 5th
    twice = Sequences(
        *(
            torch.cat([t, t])
            for t in (sequences.input_ids, sequences.position_ids, sequences.labels)
        ),
        torch.cat([sequences.real, sequences.real]),
    )
    keys = sequence_keys(next(sequences.batches(8)))
    scored_rows = [n for n in range(8) if n not in (0, 4)]
    assert missing_sequences(twice, Store(tmp_path)) == {keys[n]: n for n in scored_rows}
    write_shard(tmp_path, {keys[n]: {"x": torch.zeros(1)} for n in (1, 2)})
    assert set(missing_sequences(twice, Store(tmp_path)).values()) == {3, 5, 6, 7}


def test_states_are_the_live_teachers(place: Path) -> None:
    """At the scored tokens, also beside a block in which none is; the head too."""
    master = load(place / "teacher")
    live = Teacher(master.model(torch.bfloat16))
    cached = CachedTeacher(Cache(place / "hidden"), head_from(master, torch.device("cpu")))
    assert torch.equal(cached.head.weight_VH, head_of(live.model).weight_VH)
    sequences = build_sequences(data(place), master.tokenizer(), "train", 2)
    batch = next(sequences.batches(2))
    assert cached.sparse(batch) is None
    mask = scored(batch)
    assert torch.equal(cached.hidden(batch).final[mask], live.hidden(batch).final[mask])
    batch["labels"][0] = IGNORED
    mask = scored(batch)
    assert torch.equal(cached.hidden(batch).final[mask], live.hidden(batch).final[mask])


def test_distributions_are_in_the_order_of_the_batch(place: Path) -> None:
    master = load(place / "teacher")
    head = head_from(master, torch.device("cpu"))
    cached = CachedTeacher(Cache(place / "topk"), head)
    batch = next(build_sequences(data(place), master.tokenizer(), "train", 3).batches(3))
    exact = CachedTeacher(Cache(place / "hidden"), head).hidden(batch).final[scored(batch)]
    distributions = cached.sparse(batch)
    assert distributions is not None
    log_p = head.logits(exact, head.weight_VH).log_softmax(-1)
    expected = log_p.gather(-1, distributions.ids_NK).exp()
    assert float((distributions.probability_NK - expected).abs().max()) < 0.01
    first = log_p.gather(-1, distributions.ids_NK[:, :1]).squeeze(
        -1
    )  # logits in bfloat16 may be equal
    torch.testing.assert_close(first, log_p.max(-1).values, rtol=0, atol=0.02)
    heldout = build_sequences(data(place), master.tokenizer(), "validation", 2)
    assert cached.sparse(next(heldout.batches(2))) is None  # stored exactly
    batch["labels"][:] = IGNORED
    empty = cached.sparse(batch)
    assert empty is not None
    assert len(empty.ids_NK) == 0


def test_a_sequence_of_another_text_is_refused(place: Path) -> None:
    cached = CachedTeacher(
        Cache(place / "topk"), head_from(load(place / "teacher"), torch.device("cpu"))
    )
    with pytest.raises(UserError, match="a sequence is not in the cache"):
        cached.sparse(next(tiny_sequences(4, 32).batches(4)))


def test_ids_of_padding_are_left_out(tmp_path: Path) -> None:
    """A distribution is over the tokenizer's ids, not over all rows of the embedding."""
    ids = len(tiny_tokenizer())
    checkpoint = write_model(tmp_path / "teacher", dtype=torch.bfloat16, vocab_size=ids + 16)
    text = data_of(write_text(tmp_path / "text.jsonl"))
    assert header_of(checkpoint, text, CacheConfig()).vocab_size == ids
    narrow = write_model(tmp_path / "narrow", dtype=torch.bfloat16, vocab_size=ids - 8)
    assert header_of(narrow, text, CacheConfig()).vocab_size == ids - 8


@pytest.mark.parametrize("softcap", [None, 0.25])
def test_the_head_is_the_models_own(softcap: float | None, tmp_path: Path) -> None:
    """Read from a checkpoint, it gives the stock model's logits, softcap and all."""
    fields = {"dtype": torch.bfloat16, "final_logit_softcapping": softcap}
    checkpoint = write_model(tmp_path / "teacher", "gemma3_text", **fields)
    model = checkpoint.model(torch.float32)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        states_BTH, expected_BTV = model.base_model(ids).last_hidden_state, model(ids).logits
    head = head_from(checkpoint, torch.device("cpu"))
    found_BTV = head.logits(states_BTH, head.weight_VH.float())
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=0, atol=1e-5)
    capped = (expected_BTV.abs().max() <= 0.25).item()
    assert capped == (softcap is not None)
