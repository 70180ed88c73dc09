"""The identity of a weight file: the SHA-256 of all its bytes.

A digest is cached as long as the file's size, inode and change times stay the same: in the process,
and for large files also in the cache folder. The operating system itself sets the time of the last
change of an inode (ctime), so a file that is changed in place is read again even if its size and
modification time are restored.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from regrow.checkpoint.shards import read_header
from regrow.config import cache_folder
from regrow.runtime.progress import Progress

MEMORY = "hashes.json"
"""The file in the cache folder with the digests of large files."""
LARGE = 32 << 20
"""Size in bytes from which a file's digest is also cached on disk."""
SETTLED = 0.1
"""Seconds after a file's last change from which a further change gives it other times."""
CHUNK = 1 << 20
NOT_FINITE = {
    "F64": ("u8", 0xFFE0 << 48),
    "F32": ("u4", 0xFF << 24),
    "F16": ("u2", 0xF800),
    "BF16": ("u2", 0xFF00),
}
"""For each dtype, the numpy integer of its width, and the exponent of all ones that marks infinity
and NaN, shifted left by one bit to drop the sign."""

Stamp = tuple[int, int, int, int]


class Identity(NamedTuple):
    """The SHA-256 of a file's bytes, and the first tensor with NaN or infinity, or "" if none."""

    sha256: str
    not_finite: str = ""


class Part(NamedTuple):
    """A range of bytes in a file: a tensor with its name and stored dtype, or other bytes."""

    size: int
    name: str = ""
    dtype: str = ""


_cached: dict[str, tuple[Stamp, Identity]] = {}


def of_weights(path: Path) -> Identity:
    """The identity of a safetensors file; the same pass checks its values.

    Raises UserError for a truncated or broken file.
    """
    return _remembered(path, lambda: _read(path, _tensors(path)))


def of_file(path: Path) -> Identity:
    """The identity of any other file."""
    return _remembered(path, lambda: _read(path, iter([Part(path.stat().st_size)])))


def stamp(path: Path) -> Stamp:
    """Size, inode, and the times in ns of the last change of content and of the inode."""
    stat = path.stat()
    return stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def is_settled(changed: Stamp) -> bool:
    """Whether the last change is old enough that the next change will have other times."""
    return time.time_ns() - max(changed[2:]) > SETTLED * 1e9


def _remembered(path: Path, read: Callable[[], Identity]) -> Identity:
    key, before = str(path.resolve()), stamp(path)
    if key not in _cached and before[0] >= LARGE:
        _cached.update(_load(key))
    if key in _cached and _cached[key][0] == before:
        return _cached[key][1]
    settled = is_settled(before)
    identity = read()
    if settled and stamp(path) == before:
        _cached[key] = before, identity
        if before[0] >= LARGE:
            _store(key, before, identity)
    return identity


def _tensors(path: Path) -> Iterator[Part]:
    """The header of a safetensors file and its tensors, in the order of their bytes."""
    header = read_header(path)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for _, entry in entries]
    yield Part(path.stat().st_size - sum(sizes))
    for (name, entry), size in zip(entries, sizes, strict=True):
        yield Part(size, name, entry["dtype"])


def _read(path: Path, parts: Iterator[Part]) -> Identity:
    digest, not_finite = hashlib.sha256(), ""
    buffer = memoryview(bytearray(CHUNK))
    size = path.stat().st_size
    progress = Progress(f"hash {path.name}", size >> 20, "MiB")
    with path.open("rb", buffering=0) as file:
        for part in parts:
            for begin in range(0, part.size, CHUNK):
                chunk = buffer[: min(CHUNK, part.size - begin)]
                _fill(file, chunk)
                digest.update(chunk)
                if not not_finite and not _is_finite(chunk, part.dtype):
                    not_finite = part.name
                if size >= LARGE:
                    progress.advance((file.tell() >> 20) - progress.done)
    if progress.shown:
        progress.finish()
    return Identity(digest.hexdigest(), not_finite)


def _fill(file: Any, chunk: memoryview) -> None:
    """Read until `chunk` is full, because an unbuffered read may return fewer bytes."""
    filled = 0
    while filled < len(chunk):
        count = file.readinto(chunk[filled:])
        if not count:
            raise OSError(f"{file.name} became shorter while it was read")
        filled += count


def _is_finite(chunk: memoryview, dtype: str) -> bool:
    """Whether all values are finite; always true for dtypes of packed weights."""
    import numpy

    if dtype not in NOT_FINITE:
        return True
    kind, exponent = NOT_FINITE[dtype]
    bits = numpy.frombuffer(chunk, "<" + kind)
    return int(numpy.left_shift(bits, 1).max()) < exponent


def _entries() -> dict[str, Any]:
    """The digests in the cache folder; empty if the file is missing or broken."""
    try:
        entries = json.loads((cache_folder() / MEMORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _load(key: str) -> dict[str, tuple[Stamp, Identity]]:
    try:
        changed, identity = _entries()[key]
        return {key: (tuple(changed), Identity(*identity))}
    except (KeyError, ValueError, TypeError):
        return {}


def _store(key: str, changed: Stamp, identity: Identity) -> None:
    """Add an entry and drop those of deleted files; a lost entry only costs one more read."""
    path = cache_folder() / MEMORY
    partial = path.with_name(f"{MEMORY}.{os.getpid()}")
    entries = {name: entry for name, entry in _entries().items() if Path(name).exists()}
    with suppress(OSError):  # the cache folder may not be writable
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({**entries, key: [changed, identity]}), encoding="utf-8")
        partial.replace(path)
