"""Whole builds: splits, shares, the prefix property, running dry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer

from regrow.data import DataConfig, Split
from regrow.data import blend as blend_module
from regrow.data.blend import BuildContext, blend, shuffled
from regrow.data.documents import Passage
from regrow.data.readers import jsonl
from regrow.data.sequences import build_sequences
from regrow.errors import UserError
from regrow.runtime import progress

TOKENIZER = tiny_tokenizer()
EOS = 0
WORDS = ["The", "quick", "fox", "is", "Paris", "model", "then", "dog", "answers", "one", "blank"]


def write(path: Path, word: str, count: int, seed: int, words: int = 30) -> str:
    """A .jsonl of `count` distinct documents that begin with `word`."""
    dice = Random(seed)
    lines = []
    for number in range(count):
        body = " ".join(dice.choice(WORDS) for _ in range(dice.randrange(2, words)))
        lines.append(json.dumps({"text": f"{word}{number} {body}"}))
    path.write_text("\n".join(lines))
    return str(path)


def config(*sources: Any, **fields: Any) -> DataConfig:
    fields = {"sequence_length": 32, **fields}
    return DataConfig.model_validate({"sources": list(sources), **fields})


def texts(data: DataConfig, split: Split, limit: int | None = None) -> list[str]:
    """The documents that a build would pack, as text without the end token."""
    texts_read = []
    for document in blend(BuildContext(data, TOKENIZER, split, None)):
        texts_read.append(str(TOKENIZER.decode(document.ids[:-1])))
        if len(texts_read) == limit:
            break
    return texts_read


def test_splits_share_no_document_and_lose_none(tmp_path: Path) -> None:
    data = config(write(tmp_path / "a.jsonl", "a", 400, 1))
    written = [row["text"] for row in jsonl.read(tmp_path / "a.jsonl")]
    splits: tuple[Split, ...] = ("calibration", "heldout", "validation")
    calibration, heldout, validation = (texts(data, split) for split in splits)
    kept = [*calibration, *heldout, *validation]
    train = texts(data, "train", len(written) - len(kept))
    assert Counter(kept + train) == Counter(written)
    assert 10 <= len(validation) <= 35
    assert 10 <= len(heldout) <= 35
    assert 40 <= len(calibration) <= 80


def test_splits_do_not_depend_on_order_or_company(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", "a", 300, 1)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join(lines[::-1] + lines[:100]))
    split: Split
    for split in ("heldout", "calibration"):
        alone = set(texts(config(first), split))
        assert set(texts(config(str(tmp_path / "b.jsonl")), split)) == alone
        assert set(texts(config(first, str(tmp_path / "b.jsonl")), split)) == alone


def test_fewer_sequences_are_the_first_of_more(tmp_path: Path) -> None:
    data = config(
        {"source": write(tmp_path / "a.jsonl", "a", 120, 1), "weight": 3},
        write(tmp_path / "b.jsonl", "b", 2_000, 2),
    )
    split: Split
    for split in get_args(Split):
        larger = build_sequences(data, TOKENIZER, split, 150)
        for count in (1, 2, 33, 149):
            smaller = build_sequences(data, TOKENIZER, split, count)
            expected = larger.select(range(min(count, len(larger))))
            assert len(smaller) == len(expected)
            assert smaller.fingerprint == expected.fingerprint


def test_the_seed_changes_the_order(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", "a", 200, 1)
    same = build_sequences(config(source), TOKENIZER, "train", 20).fingerprint
    assert build_sequences(config(source), TOKENIZER, "train", 20).fingerprint == same
    assert build_sequences(config(source, seed=1), TOKENIZER, "train", 20).fingerprint != same


def test_order_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", "a", 80, 1)
    second = write(tmp_path / "b.jsonl", "b", 80, 2)
    fingerprint = build_sequences(config(first, second), TOKENIZER, "train", 20).fingerprint
    code = (
        "import sys; from tiny_tokenizer import tiny_tokenizer\n"
        "from regrow.data import DataConfig\n"
        "from regrow.data.sequences import build_sequences\n"
        "data = DataConfig.model_validate({'sources': sys.argv[1:], 'sequence_length': 32})\n"
        "print(build_sequences(data, tiny_tokenizer(), 'train', 20).fingerprint)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, first, second]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == fingerprint


def test_token_shares_follow_the_weights_at_every_prefix(tmp_path: Path) -> None:
    weights = {"a": 1.0, "b": 6.0, "c": 3.0}
    words = {"a": 12, "b": 60, "c": 30}
    data = config(
        *(
            {
                "source": write(tmp_path / f"{name}.jsonl", name, 4_000, 5, words[name]),
                "weight": weight,
            }
            for name, weight in weights.items()
        )
    )
    tokens_by_source: Counter[str] = Counter()
    longest = 0
    for count, document in enumerate(blend(BuildContext(data, TOKENIZER, "train", None)), start=1):
        tokens_by_source[str(TOKENIZER.decode(document.ids[:1]))] += len(document.ids)
        longest = max(longest, len(document.ids))
        total = tokens_by_source.total()
        for name, weight in weights.items():  # never off by more than a document or two
            assert abs(tokens_by_source[name] - weight / 10 * total) <= 2 * longest
        if count == 3_000:
            break
    for name, weight in weights.items():
        assert tokens_by_source[name] / tokens_by_source.total() == pytest.approx(
            weight / 10, abs=0.002
        )
        assert tokens_by_source[name] / tokens_by_source.total() == pytest.approx(
            weight / 10, rel=0.02
        )


def test_train_starts_over_in_another_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = config(write(tmp_path / "a.jsonl", "a", 50, 1))
    size = len(set(texts(data, "train", 200)))
    order = texts(data, "train", 3 * size)
    epochs = [order[n * size : (n + 1) * size] for n in range(3)]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3
    capsys.readouterr()
    texts(data, "train", 10 * size)
    assert capsys.readouterr().err.count("starts over") == 1


def test_an_exhausted_source_is_left_out_of_other_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write(tmp_path / "a.jsonl", "a", 40, 1)
    large = write(tmp_path / "b.jsonl", "b", 400, 2)
    order = texts(config(small, large), "calibration")
    assert len(order) == len(set(order))
    assert Counter(text[0] for text in order) == {
        "a": len(texts(config(small), "calibration")),
        "b": len(texts(config(large), "calibration")),
    }
    assert f"{small} has no more calibration text" in capsys.readouterr().err


def test_fewer_sequences_than_requested_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = config(write(tmp_path / "a.jsonl", "a", 200, 1))
    sequences = build_sequences(data, TOKENIZER, "heldout", 10_000)
    assert 1 <= len(sequences) < 100
    err = capsys.readouterr().err
    assert f"there is text for {len(sequences)} heldout sequences instead of 10000" in err


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("  \n\n ")
    split: Split
    for split in get_args(Split):
        with pytest.raises(UserError) as caught:
            build_sequences(config(str(tmp_path / "a.txt")), TOKENIZER, split, 4)
        assert str(caught.value) == (
            f"too little text: the {split} split has 0 documents with 0 tokens, none to score, "
            "and 4 sequences of 32 tokens are needed; add text or change the split's fraction"
        )


def test_one_text_file_fills_every_split(tmp_path: Path) -> None:
    dice = Random(0)
    paragraphs = [" ".join(dice.choices(WORDS, k=80)) for _ in range(3_000)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    data = config(str(tmp_path / "a.txt"))
    split: Split
    for split in get_args(Split):
        assert len(build_sequences(data, TOKENIZER, split, 20)) == 20


def test_documents_are_whole_and_masked_in_the_sequences(tmp_path: Path) -> None:
    data = config(write(tmp_path / "a.jsonl", "a", 900, 1))
    sequences = build_sequences(data, TOKENIZER, "calibration", 40)
    documents = blend(BuildContext(data, TOKENIZER, "calibration", None))
    flat: list[int] = []
    starts = set()
    while len(flat) < 40 * 32:
        starts.add(len(flat))
        flat += next(documents).ids
    assert sequences.input_ids.flatten().tolist() == flat[: 40 * 32]
    for at, (position, label) in enumerate(
        zip(
            sequences.position_ids.flatten().tolist(),
            sequences.labels.flatten().tolist(),
            strict=True,
        )
    ):
        first = at in starts or at % 32 == 0
        assert (position == 0) == first
        assert label == (-100 if first else flat[at])


def test_reads_no_further_than_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", "a", 5_000, 1)
    reads: list[str] = []
    original = blend_module.read_row

    def counting(row: dict[str, Any], location: str) -> Passage:
        reads.append(location)
        return original(row, location)

    monkeypatch.setattr(blend_module, "read_row", counting)
    build_sequences(config(source), TOKENIZER, "train", 4)
    assert 1_000 < len(reads) < 1_500  # the buffer's 1,000 documents are 80 % of those read


def test_shuffling_keeps_every_passage_in_a_small_buffer() -> None:
    most_held = 0
    yielded: list[int] = []

    def numbers() -> Any:
        nonlocal most_held
        for number in range(5_000):
            most_held = max(most_held, number - len(yielded))
            yield Passage(f"{number:010d}")

    for passage in shuffled(numbers(), Random(3), characters=3_000):
        yielded.append(int(passage.text))
    assert sorted(yielded) == list(range(5_000))
    assert 299 <= most_held <= 301  # 10 characters each
    near = sum(abs(a - b) <= 2 for a, b in pairwise(yielded))
    assert near < 100
    ranks = torch.tensor(yielded, dtype=torch.float64)
    assert (ranks - torch.arange(5_000)).abs().mean() > 100


def test_a_bad_row_is_refused_with_its_location(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, row 2: the row has the keys txt"):
        build_sequences(config(str(tmp_path / "a.jsonl")), TOKENIZER, "train", 1)


def test_train_text_without_scored_tokens_is_read_once(tmp_path: Path) -> None:
    question = {"messages": [{"role": "user", "content": "The quick fox is one dog " * 9}]}
    lines = [json.dumps(question).replace("dog", f"dog {number}") for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="none to score"):
        build_sequences(config(str(tmp_path / "a.jsonl")), TOKENIZER, "train", 4)


def test_reading_shows_its_progress_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also while rows of other splits are passed over, and before the first token is there."""
    source = write(tmp_path / "a.jsonl", "a", 3_000, 1)
    seconds = iter(range(10**9))
    clock = SimpleNamespace(monotonic=lambda: next(seconds) / 100)
    monkeypatch.setattr(progress, "time", clock)
    build_sequences(config(source), TOKENIZER, "heldout", 2)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("reading heldout text:   0 %  0/64 tokens  ETA unknown  row 1")
    assert first.endswith(f" of {source}")


def test_progress_towards_an_unknown_total() -> None:
    counter = progress.Progress("fetching a", 0, "MiB")
    counter.done = 12
    assert counter.line(counter.start + 4) == "fetching a: 12 MiB  3 MiB/s"
    bounded = progress.Progress("reading", 48, "rows")
    bounded.done = 12
    assert bounded.line(bounded.start + 4) == "reading:  25 %  12/48 rows  3 rows/s  ETA 0:12"
