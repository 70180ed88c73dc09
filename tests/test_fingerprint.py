"""The fingerprint of a checkpoint: a digest of all its bytes, read once, with a check of values."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import write_model

from regrow.checkpoint import Checkpoint, identity, load
from regrow.errors import UserError

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder and no memory of this process; every file counts as large and old."""
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_cached", {})
    monkeypatch.setattr(identity, "LARGE", 0)
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", tie_word_embeddings=True)
    return tmp_path / "model"


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads of files whose identity is asked for."""
    sizes: list[int] = []
    fill = identity._fill

    def counted(file: Any, chunk: memoryview) -> None:
        sizes.append(len(chunk))
        fill(file, chunk)

    monkeypatch.setattr(identity, "_fill", counted)
    return sizes


def spoil(folder: Path, name: str, value: float, dtype: torch.dtype = torch.float32) -> None:
    """Put `value` into the last place of a tensor of the model, stored in `dtype`."""
    weights = load_file(folder / WEIGHTS)
    weights[name] = weights[name].to(dtype)
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("size", [0, 1, identity.CHUNK, identity.CHUNK + 7])
def test_digest_of_a_file(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    (tmp_path / "x.gguf").write_bytes(content)
    assert identity.of_file(tmp_path / "x.gguf").sha256 == hashlib.sha256(content).hexdigest()


def test_digest_of_weights_is_that_of_the_whole_file(folder: Path) -> None:
    """Header, padding and tensors: none is left out."""
    expected = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert identity.of_weights(folder / WEIGHTS) == (expected, "")


def test_the_digest_depends_on_every_byte(folder: Path) -> None:
    """Another model of the same size differs, wherever it differs: here in all of its norms."""
    first = load(folder).fingerprint
    weights = load_file(folder / WEIGHTS)
    norms = {name: 3 * w for name, w in weights.items() if w.dim() == 1}
    assert norms
    save_file({**weights, **norms}, folder / WEIGHTS, {"format": "pt"})
    changed = load(folder).fingerprint
    assert changed != first
    content = bytearray((folder / WEIGHTS).read_bytes())
    for place in range(len(content) - 1, len(content) // 2, -9973):
        content[place] ^= 1
        (folder / WEIGHTS).write_bytes(content)
        assert load(folder).fingerprint not in (first, changed)
        content[place] ^= 1


def test_the_second_fingerprint_reads_no_file(
    folder: Path, bytes_read: list[int], cache: Path
) -> None:
    """Neither in the same process nor, of a large file, in another one."""
    size = (folder / WEIGHTS).stat().st_size
    first = Checkpoint(folder).fingerprint
    assert sum(bytes_read) == size
    assert Checkpoint(folder).fingerprint == first
    assert sum(bytes_read) == size
    identity._cached.clear()
    assert Checkpoint(folder).fingerprint == first
    assert sum(bytes_read) == size
    identity._cached.clear()
    (cache / identity.MEMORY).unlink()
    assert Checkpoint(folder).fingerprint == first
    assert sum(bytes_read) == 2 * size


def test_a_small_file_is_not_cached_on_disk(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "LARGE", 1 << 40)
    assert Checkpoint(folder).fingerprint
    assert not cache.exists()


def test_a_file_changed_in_place_with_restored_times_is_read_again(folder: Path) -> None:
    """The system's own time of the change gives it away."""
    first, path = Checkpoint(folder).fingerprint, folder / WEIGHTS
    before = path.stat()
    time.sleep(0.05)  # the clock of a disk may have a tick of some milliseconds
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        *(before.st_size, before.st_mtime_ns),
        before.st_ino,
    )
    assert Checkpoint(folder).fingerprint != first


def test_a_file_just_written_is_not_cached(
    folder: Path, bytes_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its times might not tell the next change from the last one."""
    monkeypatch.setattr(identity, "SETTLED", 60.0)
    size = (folder / WEIGHTS).stat().st_size
    assert Checkpoint(folder).fingerprint == Checkpoint(folder).fingerprint
    assert sum(bytes_read) == 2 * size


@pytest.mark.parametrize("content", ["", "[]", "{", '{"PATH": 3}', '{"PATH": [[1], ["x"]]}'])
def test_a_broken_cache_file_is_ignored(content: str, folder: Path, cache: Path) -> None:
    expected = Checkpoint(folder).fingerprint
    identity._cached.clear()
    cache.mkdir(exist_ok=True)
    (cache / identity.MEMORY).write_text(content.replace("PATH", str(folder / WEIGHTS)))
    assert Checkpoint(folder).fingerprint == expected


def test_the_cache_drops_deleted_files(folder: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"x")
    assert identity.of_file(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").unlink()
    assert Checkpoint(folder).fingerprint
    assert list(json.loads((cache / identity.MEMORY).read_text())) == [str(folder / WEIGHTS)]


def test_a_read_only_cache_folder_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "file" / "cache"))
    assert Checkpoint(folder).fingerprint


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused(
    dtype: torch.dtype, value: float, folder: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(folder, name, torch.finfo(dtype).max, dtype)
    assert Checkpoint(folder).fingerprint
    spoil(folder, name, torch.finfo(dtype).min, dtype)
    assert Checkpoint(folder).fingerprint
    spoil(folder, name, value, dtype)
    for _ in range(2):  # read, and remembered
        with pytest.raises(UserError, match=f"model: {name} has values that are NaN or infinite"):
            assert Checkpoint(folder).fingerprint
