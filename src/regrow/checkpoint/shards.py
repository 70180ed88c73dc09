"""The safetensors files of a folder: read and check the headers, write tensors one by one.

A file consists of 8 bytes with the length of the header, a JSON header
{name: {dtype, shape, data_offsets}}, and the bytes of the tensors without gaps. The safetensors
package needs all tensors of a file in memory to write it. This module writes tensor by tensor, so a
model may be larger than memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.errors import UserError
from regrow.stage_dir import write_json

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8}
BITS |= {"I64": 64, "I32": 32, "I8": 8, "U8": 8}
"""Bits per value of the dtypes whose sizes are checked; Checkpoint.dtype refuses all others."""
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes that weights may have, with torch's names."""
PACKED = {"I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8", "F8_E4M3": "float8_e4m3fn"}
"""Additional dtypes for packed quantized weights."""
STORED = {torch_name: stored for stored, torch_name in {**DTYPES, **PACKED}.items()}
ALIGNMENT = 8

Header = dict[str, dict[str, Any]]


def read_headers(folder: Path) -> tuple[dict[str, str], Header]:
    """The file and the header entry of each tensor of a folder, in the order on disk.

    Raises UserError, in one line, for missing, pickled, truncated or broken files.
    """
    shard_of: dict[str, str] = {}
    headers: Header = {}
    for shard in weight_files(folder):
        header = read_header(folder / shard)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if name in shard_of:
                raise UserError(
                    f"{name} is in {shard_of[name]} and in {shard} of {folder}: fetch the model "
                    "again into an empty folder"
                )
            if not name.endswith("rotary_emb.inv_freq"):
                shard_of[name], headers[name] = shard, entry
    if not headers:
        raise UserError(f"no tensors in {folder}: the safetensors files are empty")
    return shard_of, headers


def write_shards(
    folder: Path,
    layout: Mapping[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_bytes: int,
) -> None:
    """Write a stream of tensors to files of at most `max_bytes`, with one tensor in memory.

    `layout` maps the names of the stream, in order, to tensors of the same shape and dtype, which
    may be on the meta device. A tensor larger than `max_bytes` gets its own file. If there are
    several files, an index is written.
    """
    shards = _split(layout, max_bytes)
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else _numbered(number, len(shards))
        _write_shard(folder / file, {name: layout[name] for name in names}, stream)
        weight_map.update(dict.fromkeys(names, file))
    assert next(stream, None) is None, "the stream has more tensors than the layout"
    if len(shards) > 1:
        total = sum(map(_bytes, layout.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def weight_files(folder: Path) -> list[str]:
    """The weight files, chosen by the same rules as in transformers.

    A single file takes precedence over an index. Raises UserError for missing, broken or pickled
    files.
    """
    if (folder / SINGLE).exists():
        return [SINGLE]
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
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt*")):
        raise UserError(
            f"{folder} has pickled weights only, which can run code when opened: "
            "save them as safetensors first (model.save_pretrained of transformers does)"
        )
    raise UserError(f"no {SINGLE} in {folder}: only safetensors are read, no pickled weights")


def read_header(path: Path) -> Header:
    """The JSON header of a safetensors file; raises UserError when the file is broken."""
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
    """Bytes of all tensors; raises ValueError for gaps and for sizes that do not fit the shapes."""
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        begin, stop = entry["data_offsets"]
        bits = math.prod(entry["shape"]) * BITS.get(entry["dtype"], 0)
        if begin != end or (bits and (stop - begin) * 8 != bits):
            raise ValueError(entry)
        end = stop
    return int(end)


def _split(layout: Mapping[str, torch.Tensor], max_bytes: int) -> list[list[str]]:
    """The tensor names for each file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in layout.items():
        if shards[-1] and size + _bytes(tensor) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(tensor)
    return shards


def _write_shard(
    path: Path, layout: dict[str, torch.Tensor], stream: Iterator[tuple[str, torch.Tensor]]
) -> None:
    import torch

    header = _header(layout)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), expected in zip(islice(stream, len(layout)), layout, strict=True):
            assert name == expected and tensor.shape == layout[name].shape, (
                f"{name} is not {expected}"
            )
            assert tensor.dtype == layout[name].dtype, name
            file.seek(start + header[name]["data_offsets"][0])
            file.write(tensor.cpu().flatten().view(torch.uint8).numpy().data)


def _header(layout: dict[str, torch.Tensor]) -> Header:
    """Header entries, the widest dtypes first, so that every tensor is aligned to its dtype."""
    header: Header = {}
    end = 0
    for name, tensor in sorted(layout.items(), key=lambda item: -item[1].element_size()):
        begin, end = end, end + _bytes(tensor)
        stored = STORED[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {
            "dtype": stored,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    return header


def _numbered(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
