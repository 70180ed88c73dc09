"""Prepared text: the same sequences as the text itself, kills, refusals, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tiny_folders import write_model, write_text
from tiny_job import call, refused
from tiny_tokenizer import SENTENCES, tiny_tokenizer_of
from tiny_training import start_ranks

import regrow
from regrow import UserError, stage_dir
from regrow.card import _text_of
from regrow.checkpoint import load
from regrow.data import DataConfig, SourceConfig, Split
from regrow.data.blend import BuildContext, blend
from regrow.data.documents import place_of, prefix_ids, split_of
from regrow.data.prepared import Prepared, in_split
from regrow.data.sequences import Sequences, build_sequences
from regrow.data.sources import check_source, data_digest, resolve
from regrow.runtime import distributed
from regrow.stages.prepare import PrepareConfig

SPLITS = get_args(Split)
IN_FILE_ORDER = PrepareConfig(order="files", shard_characters=4_000)
SHUFFLED = PrepareConfig(shard_characters=4_000)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and text in all forms of rows: long and short, with prompts, and conversations."""
    place = tmp_path_factory.mktemp("prepare")
    write_model(place / "model")
    write_text(place / "text.jsonl")
    rows: list[dict[str, Any]] = []
    for number in range(120):
        sentence = f"{number} {SENTENCES[number % 5]}"
        rows.append({"prompt": sentence, "completion": f"{number} {SENTENCES[number % 3]}"})
        turns = [{"role": "user", "content": sentence}, {"role": "assistant", "content": "Yes."}]
        rows.append({"messages": turns})
        rows.append({"text": sentence, "split_at": (number % 10) / 10})
        rows.append({"text": "  "})
    rows.append({"text": "\n\n".join(f"{n} {SENTENCES[n % 5]}" for n in range(900))})
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def text_of(place: Path, **fields: Any) -> DataConfig:
    sources = [{"source": str(place / "text.jsonl"), "weight": 2}, str(place / "rows.jsonl")]
    shares = {"heldout_fraction": 0.2, "calibration_fraction": 0.2, "validation_fraction": 0.2}
    return DataConfig.model_validate({"sources": sources, "sequence_length": 32} | shares | fields)


def of_folder(data: DataConfig, folder: Path) -> DataConfig:
    """`data` with a prepared folder as its source."""
    return DataConfig.model_validate({**data.model_dump(), "sources": str(folder)})


def same(one: Sequences, other: Sequences) -> bool:
    return all(torch.equal(one[:][name], other[:][name]) for name in one[:])


@pytest.fixture(scope="module")
def prepared(place: Path) -> Path:
    return regrow.prepare(place / "model", text_of(place), place / "prepared", IN_FILE_ORDER, 1)


@pytest.mark.parametrize("split", SPLITS)
def test_tokens_in_file_order_are_those_of_the_text(
    place: Path, prepared: Path, split: Split
) -> None:
    """Also over two epochs of the train text, which have different orders."""
    data, tokenizer = text_of(place), load(place / "model").tokenizer()
    count = 1_500 if split == "train" else 60
    direct = build_sequences(data, tokenizer, split, count)
    assert len(Prepared(next(prepared.glob("text-*"))).index.shards) > 5
    stored = build_sequences(of_folder(data, prepared), tokenizer, split, count)
    assert same(direct, stored)
    assert direct.fingerprint == stored.fingerprint


def test_tokenizers_with_bos_and_losses_by_source(tmp_path: Path, place: Path) -> None:
    write_model(tmp_path / "model")
    tiny_tokenizer_of("byte fallback").save_pretrained(str(tmp_path / "model"))
    tokenizer = load(tmp_path / "model").tokenizer()
    assert prefix_ids(tokenizer)
    source = {"source": str(place / "text.jsonl"), "weight": 2.5, "losses": {"kl": 1.0}}
    data = text_of(place, sources=[source, {**source, "losses": None}])
    regrow.prepare(tmp_path / "model", data, tmp_path / "out", IN_FILE_ORDER, 1)
    again = of_folder(data, tmp_path / "out")
    assert [each.weight for each in again.sources] == [2.5, 2.5]
    assert [each.losses for each in again.sources] == [{"kl": 1.0}, None]
    direct = build_sequences(data, tokenizer, "train", 40)
    assert direct.source is not None
    assert same(direct, build_sequences(again, tokenizer, "train", 40))


def documents(data: DataConfig, place: Path, split: Split) -> list[tuple[int, ...]]:
    """The documents of one epoch of a single source."""
    tokenizer = load(place / "model").tokenizer()
    read: list[tuple[int, ...]] = []
    for document in blend(BuildContext(data, tokenizer, split)):
        if tuple(document.ids) in read:
            break  # the second epoch of train text; all documents differ
        read.append(tuple(document.ids))
    return read


@pytest.mark.parametrize("split", SPLITS)
def test_shuffled_splits_have_the_documents_of_the_text(
    place: Path, tmp_path: Path, split: Split
) -> None:
    data = text_of(place, sources=[str(place / "text.jsonl")])
    regrow.prepare(place / "model", data, tmp_path / "out", SHUFFLED, 1)
    shuffled = documents(of_folder(data, tmp_path / "out"), place, split)
    direct = documents(data, place, split)
    assert sorted(shuffled) == sorted(direct)
    assert shuffled != direct
    other = {"heldout_fraction": 0.1, "calibration_fraction": 0.3, "validation_fraction": 0.05}
    changed = text_of(place, sources=[str(place / "text.jsonl")], **other)
    assert sorted(documents(of_folder(changed, tmp_path / "out"), place, split)) == sorted(
        documents(changed, place, split)
    )


def test_a_shuffled_sample_is_from_the_whole_source(place: Path, tmp_path: Path) -> None:
    """Both ends of the source, in another order by seed and epoch; a shorter one is its start."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(50):
        write_text(folder / f"{number:02d}.jsonl", documents=20, seed=number)
    data = text_of(place, sources=[str(folder)])
    regrow.prepare(place / "model", data, tmp_path / "out", SHUFFLED, 1)
    data = of_folder(data, tmp_path / "out")
    source = Prepared(Path(data.sources[0].source))
    first = [stored.shard for stored in islice(source.shuffled(data, "train", "0"), 100)]
    last = len(source.index.shards) - 1
    assert len(set(first)) > 30
    assert min(first) < 3 < last - 3 < max(first)
    orders = [list(source.shuffled(data, "train", seed)) for seed in ("0", "0", "1")]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    tokenizer = load(place / "model").tokenizer()
    short, long = (build_sequences(data, tokenizer, "train", count) for count in (5, 20))
    assert same(short, long.select(range(5)))


def test_the_split_of_a_place_is_that_of_a_document() -> None:
    data = DataConfig(sources=["x"], heldout_fraction=0.1, calibration_fraction=0.2)
    near = [edge + step for edge in (0.1, 0.3, 0.1 + 0.2, 0.35) for step in (-1e-16, 0.0, 1e-16)]
    places = np.array([*near, *(place_of(str(n), 0) for n in range(2_000))])
    for split in SPLITS:
        expected = [split_of("", data, float(place)) == split for place in places]
        assert in_split(places, data, split).tolist() == expected


def test_a_kill_keeps_finished_shards(place: Path, prepared: Path, tmp_path: Path) -> None:
    """The process is killed at once, and its workers end with it; one process and several write
    the same shards."""
    code = """import sys, time, regrow
from regrow.stages.prepare import PrepareConfig, workers

if __name__ == "__main__":
    data = regrow.DataConfig.model_validate_json(sys.argv[2])
    config = PrepareConfig(order="files", shard_characters=4_000)
    regrow.prepare(sys.argv[1], data, sys.argv[3], config, 2)
else:  # in the workers
    write = workers.write_shard

    def slowly(*arguments):
        time.sleep(0.2)
        write(*arguments)

    workers.write_shard = slowly
"""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(code)
    data = text_of(place)
    arguments = [
        sys.executable,
        str(script),
        str(place / "model"),
        data.model_dump_json(),
        str(out),
    ]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        partial = tmp_path / ".out.partial"
        _wait_for(lambda: len(list(partial.glob("*/0*"))) >= 3)
        process.kill()
        process.wait()
        _wait_for(lambda: not _alive(process.pid))
    finally:
        if _alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in partial.glob("*/0*/ids.npy")}
    assert 3 <= len(kept) < len(list(prepared.glob("*/0*")))
    regrow.prepare(place / "model", data, out, IN_FILE_ORDER, 2)
    for path, changed in kept.items():
        assert (out / path.relative_to(partial)).stat().st_mtime_ns == changed
    for path in prepared.rglob("*.npy"):
        assert path.read_bytes() == (out / path.relative_to(prepared)).read_bytes()


def _wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_source_more_or_another_weight_keeps_the_tokens(place: Path, tmp_path: Path) -> None:
    """A finished folder is not written again; what it has is taken over by links."""
    sources = [str(place / "text.jsonl")]
    out = regrow.prepare(
        place / "model", text_of(place, sources=sources), tmp_path / "out", None, 1
    )
    before = {path.relative_to(out): path.stat().st_ino for path in out.rglob("*.npy")}
    manifest = (out / "manifest.json").read_bytes()
    regrow.prepare(place / "model", text_of(place, sources=sources), out, None, 1)
    assert (out / "manifest.json").read_bytes() == manifest
    regrow.prepare(place / "model", text_of(place), out, None, 1)
    assert {path: (out / path).stat().st_ino for path in before} == before
    data = of_folder(text_of(place), out)
    assert [each.weight for each in data.sources] == [2, 1]
    assert len(build_sequences(data, load(place / "model").tokenizer(), "train", 9)) == 9


def test_a_prepared_folder_beside_other_sources_keeps_its_share(
    place: Path, prepared: Path
) -> None:
    beside = [{"source": str(prepared), "weight": 6}, str(place / "rows.jsonl")]
    data = text_of(place, sources=beside)
    assert [each.weight for each in data.sources] == pytest.approx([4, 2, 1])
    assert _text_of(data.sources[0]) == str(place / "text.jsonl")  # for the model card
    with pytest.raises(ValueError, match="leave out reader and sha256"):
        text_of(place, sources=[{"source": str(prepared), "sha256": "0" * 64}])


def test_another_tokenizer_seed_or_length_is_refused(
    place: Path, prepared: Path, tmp_path: Path
) -> None:
    tokenizer = load(place / "model").tokenizer()
    data = of_folder(text_of(place), prepared)
    with pytest.raises(UserError, match=r"was prepared with another tokenizer .* prepare again"):
        build_sequences(data, tiny_tokenizer_of("byte fallback"), "train", 2)
    for fields, what in (({"seed": 3}, "seed"), ({"sequence_length": 2_000}, "section length")):
        changed = data.model_copy(update=fields)
        with pytest.raises(UserError, match=f"was prepared with another {what}"):
            build_sequences(changed, tokenizer, "train", 2)


def test_a_changed_source_is_refused_and_a_missing_one_is_not(place: Path, tmp_path: Path) -> None:
    """Another time of change with the same content is accepted."""
    text, tokenizer = write_text(tmp_path / "text.jsonl"), load(place / "model").tokenizer()
    data = text_of(place, sources=[str(text)])
    regrow.prepare(place / "model", data, tmp_path / "out", None, 1)
    data = of_folder(data, tmp_path / "out")
    before, digest = build_sequences(data, tokenizer, "train", 9), data_digest(data)
    os.utime(text, (1, 1))
    assert same(before, build_sequences(data, tokenizer, "train", 9))
    content = text.read_text()
    text.write_text(content.replace("0", "1"))
    with pytest.raises(UserError, match=r"was prepared before .*text.jsonl changed"):
        check_source(data.sources[0])
    with pytest.raises(UserError, match=r"was prepared before .*text.jsonl changed"):
        build_sequences(data, tokenizer, "train", 9)
    text.unlink()
    assert same(before, build_sequences(data, tokenizer, "train", 9))
    assert data_digest(data) == digest
    write_text(text, seed=1)
    regrow.prepare(place / "model", text_of(place, sources=[str(text)]), tmp_path / "out", None, 1)
    assert data_digest(of_folder(data, tmp_path / "out")) != digest


def test_what_needs_text_refuses_tokens_and_broken_folders_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.jsonl", documents=20)
    command = ("prepare", place / "model", "--data", text)
    call(*command, "--out", tmp_path / "new", "--dry-run")
    assert "1 local files" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    call(*command, "--out", tmp_path / "out", "--workers", 1)
    message = refused(capsys, "prepare", place / "model", "--data", tmp_path / "out", "--out", "x")
    assert "is prepared already: give the text itself" in message
    message = refused(capsys, *command, "--out", tmp_path / "new", "--workers", -1)
    assert "workers -1: give a number of processes" in message
    inside = ("--data", tmp_path, "--out", tmp_path / "new")
    assert "is in the source" in refused(capsys, "prepare", place / "model", *inside)
    (tmp_path / "empty.jsonl").write_text(json.dumps({"text": " "}))
    empty = ("--data", tmp_path / "empty.jsonl", "--workers", 1)
    message = refused(capsys, "prepare", place / "model", *empty, "--out", tmp_path / "new")
    assert "has no text: leave it out" in message
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="has prepared tokens, not text"):
        resolve(SourceConfig(source=str(tmp_path / "out")))
    data = of_folder(text_of(place), tmp_path / "out")
    next((tmp_path / "out").glob("*/000000/ids.npy")).unlink()
    with pytest.raises(UserError, match="000000 is broken: delete the prepared folder"):
        build_sequences(data, load(place / "model").tokenizer(), "train", 2)


def _read(rank: int, place: str, out: str) -> None:
    """Prepare, which the first process does, and read the result in every process."""
    data = text_of(Path(place))
    regrow.prepare(Path(place) / "model", data, Path(out) / "prepared", SHUFFLED, 1)
    data = of_folder(data, Path(out) / "prepared")
    tokenizer = load(Path(place) / "model").tokenizer()
    sequences = build_sequences(data, tokenizer, "train", 30)
    stage_dir.write_json(Path(out) / f"{rank}.json", sequences.fingerprint)
    distributed.join()


@pytest.mark.slow
def test_two_processes_read_the_same_sequences(place: Path, tmp_path: Path) -> None:
    start_ranks(2, _read, str(place), str(tmp_path))
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    regrow.prepare(place / "model", text_of(place), tmp_path / "alone", SHUFFLED, 1)
    data = of_folder(text_of(place), tmp_path / "alone")
    alone = build_sequences(data, load(place / "model").tokenizer(), "train", 30)
    assert seen == [alone.fingerprint] * 2
