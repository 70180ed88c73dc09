"""The safetensors files of a folder: their headers read and checked, a stream of tensors written.

A file is 8 bytes with the header's length, a JSON header {name: {dtype, shape, data_offsets}}, and
the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.errors import UserError
from regrow.manifest import write_json

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I8": 8, "U8": 8}
"""Of the dtypes whose size is checked; others are told apart, and refused, by Checkpoint.dtype."""

Header = dict[str, dict[str, Any]]


def read_headers(folder: Path) -> tuple[dict[str, str], Header]:
    """The file of each tensor of a folder, and its header entry, in the order on disk.

    Raises UserError, in one line, for missing, pickled, truncated or broken files.
    """
    shard_of: dict[str, str] = {}
    headers: Header = {}
    for shard in _shards(folder):
        header = _read_header(folder / shard)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if not name.endswith("rotary_emb.inv_freq"):
                shard_of[name], headers[name] = shard, entry
    if not headers:
        raise UserError(f"no tensors in {folder}: the safetensors files are empty")
    return shard_of, headers


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> None:
    """Write a stream of tensors into files of at most `max_bytes` each, one held at a time.

    A tensor larger than that has a file of its own. Several files get an index.
    """
    shards: list[dict[str, int]] = []
    waiting: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        tensor_bytes = tensor.numel() * tensor.element_size()
        if waiting and size + tensor_bytes > max_bytes:
            shards.append(_write_shard(folder, len(shards), waiting))
            waiting, size = {}, 0
        waiting[name] = tensor.contiguous()
        size += tensor_bytes
        del tensor
    shards.append(_write_shard(folder, len(shards), waiting))
    _name_shards(folder, shards)


def _shards(folder: Path) -> list[str]:
    index = folder / INDEX
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} is broken: fetch the model again") from None
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise UserError(f"{folder / missing[0]} is missing: fetch the model again")
        return shards
    if (folder / SINGLE).exists():
        return [SINGLE]
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt*")):
        raise UserError(
            f"{folder} has pickled weights only, which can run code when opened: "
            "save them as safetensors first (model.save_pretrained of transformers does)"
        )
    raise UserError(f"no {SINGLE} in {folder}: only safetensors are read, no pickled weights")


def _read_header(path: Path) -> Header:
    """The JSON header of a safetensors file, checked in itself and against the file's size."""
    broken = UserError(f"{path} is truncated or no safetensors file: fetch or write it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise broken
        try:
            header: Header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = _end_of_data(header)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise broken from None
    if 8 + length + end != size:
        raise broken
    return header


def _end_of_data(header: Header) -> int:
    """Bytes that the tensors take; ValueError for gaps and for sizes that are not the shape's."""
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        begin, stop = entry["data_offsets"]
        bits = math.prod(entry["shape"]) * BITS.get(entry["dtype"], 0)
        if begin != end or (bits and (stop - begin) * 8 != bits):
            raise ValueError(entry)
        end = stop
    return int(end)


def _write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    from safetensors.torch import save_file

    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    save_file(tensors, folder / f"shard-{number:05d}", metadata={"format": "pt"})
    return sizes


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    if len(shards) == 1:
        (folder / "shard-00000").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, sizes in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number:05d}").rename(folder / final)
        weight_map.update(dict.fromkeys(sizes, final))
    total = sum(sum(sizes.values()) for sizes in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
