"""A cache that is stopped, cut short, added to, or made by several: the same files in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from tiny_cache import TOKENS, files, make_cache
from tiny_distillation import write_place
from tiny_training import start_ranks

from regrow.errors import UserError
from regrow.stage_dir import read
from regrow.stages.cache import stage
from regrow.training.cache import store

SHARD = 5 * 32
"""Tokens of a shard: 5 blocks, of 48 to train on and 6 held out, make 10 and 2 shards."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SHARD_TOKENS", SHARD)


@pytest.fixture(scope="module")
def uninterrupted(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a cache that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "SHARD_TOKENS", SHARD)
        return files(make_cache(place, tmp_path_factory.mktemp("whole") / "cache"))


class Written:
    """Counts the shards that are written."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.save = 0, store.save_file
        patch.setattr(store, "save_file", self)

    def __call__(self, tensors: Any, path: Path) -> None:
        self.count += 1
        self.save(tensors, path)


KILLED = f"""
import os, signal, sys
from pathlib import Path
from regrow.stages.cache import stage
from regrow.training.cache import store
stage.SHARD_TOKENS = {SHARD}
save, done = store.save_file, []
def die(tensors, path):
    save(tensors, path)
    done.append(path)
    if len(done) == 4:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
store.save_file = die
from tiny_cache import make_cache
make_cache(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_cache_killed_while_writing_resumes_to_the_same_files(
    place: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, str(place), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    left = [path.name for path in (tmp_path / ".cache.partial").rglob("*") if path.is_file()]
    assert sum(name.endswith(".safetensors") for name in left) == 3
    assert sum(".partial-" in name for name in left) == 1
    written = Written(monkeypatch)
    make_cache(place, out)
    assert files(out) == uninterrupted
    assert written.count == len(uninterrupted) - 1 - 3  # all but the header and what was there
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_shard_cut_in_half_is_redone(
    place: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One under its own name, as a crash of the machine may leave it."""
    out = make_cache(place, tmp_path / "cache")
    broken = sorted((out / "train").iterdir())[2]
    os.truncate(broken, broken.stat().st_size // 2)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "digest": None}))
    written = Written(monkeypatch)
    make_cache(place, out)
    assert written.count == 1
    assert files(out) == uninterrupted


def test_a_larger_budget_extends_a_cache(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger budget keeps what is there, and holds the same blocks as one made at once."""
    out = make_cache(place, tmp_path / "cache", tokens=TOKENS // 2, heldout_sequences=2)
    before = files(out)
    written = Written(monkeypatch)
    assert make_cache(place, out, tokens=TOKENS // 2, heldout_sequences=2) == out
    assert written.count == 0
    make_cache(place, out)
    after = files(out)
    assert written.count == len(after) - len(before)
    del before["cache.json"]
    assert {name: after[name] for name in before} == before
    at_once = make_cache(place, tmp_path / "other")
    for split in ("train", "heldout"):
        extended, written_at_once = store.Store(out / split), store.Store(at_once / split)
        assert sorted(extended.keys()) == sorted(written_at_once.keys())
        for key in extended.keys():  # noqa: SIM118
            rows, expected = extended.read(key), written_at_once.read(key)
            assert rows.keys() == expected.keys()
            assert all(rows[name].equal(expected[name]) for name in rows)
    figures = {
        folder: {row["name"]: row["value"] for row in (read(folder) or {})["figures"]}
        for folder in (out, at_once)
    }
    assert figures[out]["tokens"] == figures[at_once]["tokens"]
    assert figures[out]["error"] == pytest.approx(figures[at_once]["error"])


def _make(rank: int, place: str, out: str) -> None:
    stage.SHARD_TOKENS = SHARD
    make_cache(Path(place), Path(out))


def test_two_ranks_write_the_files_of_one(
    place: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "several" / "cache"
    start_ranks(2, _make, str(place), str(out))
    assert files(out) == uninterrupted
    assert [path.name for path in out.parent.iterdir()] == ["cache"]


def test_a_full_disk_keeps_the_finished_shards(
    place: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written stays valid, and it goes on when there is room."""
    written = Written(monkeypatch)

    def full(tensors: Any, path: Path) -> None:
        written(tensors, path)
        if written.count == 4:
            os.truncate(path, 100)
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store, "save_file", full)
    out = tmp_path / "cache"
    with pytest.raises(UserError, match=f"no disk space left while writing {out}: free some"):
        make_cache(place, out)
    partial = tmp_path / ".cache.partial"
    assert len(store.Store(partial / "heldout")) == 6
    assert len(store.Store(partial / "train")) == 5
    assert not list(partial.rglob("*.partial-*"))
    make_cache(place, out)
    assert files(out) == uninterrupted
    assert written.count == len(uninterrupted) - 1 + 1
