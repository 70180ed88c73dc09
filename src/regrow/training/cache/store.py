"""Stores sequences of tensors in safetensors shards; they are looked up by key and memory-mapped.

A shard has `keys` uint8 [n, 32]. Each named tensor is the concatenation of all sequences, and
`NAME.ends` int64 [n] is the end of each sequence's part. A shard's name is a hash of its keys, and
a shard gets this name only when it is complete, so several processes may write into one folder.
Small integers are packed into as few bits as they need.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def bit_width(size: int) -> int:
    """The bits of a number below `size`: ceil(log2 size), at least 1."""
    return max(1, (size - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """The bytes of a packed row of `count` numbers."""
    return -(-count * bits // 8)


def pack(values_NK: Tensor, bits: int) -> Tensor:
    """Pack each row into one bit string, highest bit first, padded with zeros: uint8 [N, bytes]."""
    values = values_NK.cpu().numpy()
    assert values.size == 0 or (values.min() >= 0 and values.max() < 1 << bits), bits
    shifts = np.arange(bits - 1, -1, -1)
    digits = (values[..., None] >> shifts & 1).astype(np.uint8)
    return torch.from_numpy(np.packbits(digits.reshape(len(values), -1), axis=1))


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Unpack the `count` numbers of each row that `pack` packed: int64 [N, K]."""
    digits = np.unpackbits(packed.numpy(), axis=1, count=count * bits)
    values = np.zeros((len(packed), count), dtype=np.int64)
    for digit in np.moveaxis(digits.reshape(len(packed), count, bits), -1, 0):
        values = values << 1 | digit
    return torch.from_numpy(values)


KEY_BYTES = 32
OPEN_FILES = 256
ENDS = ".ends"
Sequence = dict[str, Tensor]


def shard_name(keys: Iterable[bytes]) -> str:
    """The file name of the shard with these keys, in this order."""
    return f"{hashlib.sha256(b''.join(keys)).hexdigest()[:16]}.safetensors"


def save_file(tensors: Sequence, path: Path) -> None:
    """Write like safetensors' `save_file`, except that only the umask limits who can read it."""
    path.write_bytes(save(tensors))


def write_shard(folder: Path, sequences: dict[bytes, Sequence]) -> Path:
    """Write sequences, by key, as one file, which gets its final name when it is complete."""
    keys = torch.frombuffer(bytearray(b"".join(sequences)), dtype=torch.uint8)
    tensors = {"keys": keys.view(-1, KEY_BYTES)}
    for name in next(iter(sequences.values())):
        parts = [sequence[name] for sequence in sequences.values()]
        tensors[name] = torch.cat(parts).contiguous()
        tensors[name + ENDS] = torch.tensor([len(part) for part in parts]).cumsum(0)
    path = folder / shard_name(sequences)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        save_file(tensors, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


class Store:
    """The shards of a folder; broken ones are listed in `broken` and not read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.broken = folder, list[Path]()
        self._place: dict[bytes, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    keys = file.get_tensor("keys")
            except (SafetensorError, OSError):
                self.broken.append(path)
                continue
            rows = keys.numpy().tobytes()
            for row in range(len(keys)):
                place = row * KEY_BYTES
                self._place[rows[place : place + KEY_BYTES]] = (path, row)

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def __len__(self) -> int:
        return len(self._place)

    def keys(self) -> list[bytes]:
        """The keys of all sequences, in the order of the files."""
        return list(self._place)

    def tokens(self) -> int:
        """The number of scored tokens of all sequences, from their tensor `tokens`."""
        return sum(int(self.read(key)["tokens"]) for key in self._place)

    def read(self, key: bytes) -> Sequence:
        """The tensors of a sequence; raises KeyError if it is not stored."""
        path, row = self._place[key]
        file, ends = self._shard(path)
        found = {}
        for name, all_ends in ends.items():
            begin = int(all_ends[row - 1]) if row else 0
            found[name] = file.get_slice(name)[begin : int(all_ends[row])]
        return found

    def bytes(self) -> int:
        """The bytes of the files."""
        return sum(path.stat().st_size for path in {path for path, _ in self._place.values()})

    def _shard(self, path: Path) -> tuple[Any, dict[str, Tensor]]:
        if path not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.clear()
            file = safe_open(path, framework="pt")
            names = [name.removesuffix(ENDS) for name in file.keys() if name.endswith(ENDS)]  # noqa: SIM118
            self._open[path] = (file, {name: file.get_tensor(name + ENDS) for name in names})
        found: tuple[Any, dict[str, Tensor]] = self._open[path]
        return found
