"""Folders whose sparse weights are stored as their values and a bit for each place.

This is the format `sparse-bitmask` of compressed-tensors up to 0.14. For the weight [R, C] of a
module it stores MODULE.compressed, the values that are not zero in the order of the rows;
MODULE.bitmask [R, ⌈C/8⌉], a bit for each column, lowest bit first; MODULE.row_offsets [R], the
number of values before each row; and MODULE.shape, the numbers R and C.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow import stage_dir
from regrow.checkpoint import identity
from regrow.checkpoint.carried import carry
from regrow.checkpoint.model_cache import cached_model
from regrow.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "sparse-bitmask"
PARTS = ("bitmask", "compressed", "row_offsets", "shape")
"""The last part of the names of the stored tensors."""
MAX_SHARD_BYTES = 5_000_000_000
SERVED = "transformers, vLLM and llama.cpp compute with zeros as with other values"
WEIGHT = ".weight"


def stored_bytes(shape: tuple[int, ...], values: int, itemsize: int) -> int:
    """Bytes of a weight of this shape with so many `values` that are not zero."""
    rows, columns = shape
    return values * itemsize + rows * math.ceil(columns / 8) + 8 * rows + 16


def pack(weight_RC: Tensor) -> dict[str, Tensor]:
    """The tensors to store, by the last part of their names."""
    import numpy
    import torch

    weight_RC = weight_RC.cpu()
    present_RC = weight_RC != 0
    bits = numpy.packbits(present_RC.numpy(), axis=1, bitorder="little")
    counts_R = present_RC.sum(1)
    return {
        "bitmask": torch.from_numpy(bits),
        "compressed": weight_RC[present_RC],
        "row_offsets": counts_R.cumsum(0) - counts_R,
        "shape": torch.tensor(weight_RC.shape),
    }


def unpack(stored: dict[str, Tensor]) -> Tensor:
    """The weight [R, C] whose `pack` is `stored`: the same bits, except that −0.0 becomes 0.0."""
    import numpy
    import torch

    rows, columns = stored["shape"].tolist()
    bits = numpy.unpackbits(stored["bitmask"].numpy(), axis=1, count=columns, bitorder="little")
    weight_RC = torch.zeros(rows, columns, dtype=stored["compressed"].dtype)
    weight_RC[torch.from_numpy(bits).bool()] = stored["compressed"]
    return weight_RC


def sparsity_config(ignore: list[str], share: float, structure: str) -> dict[str, Any]:
    """`quantization_config` of config.json; `ignore` are the linear modules that stay dense."""
    sparse = {
        "format": FORMAT,
        "targets": ["Linear"],
        "ignore": ignore,
        "global_sparsity": share,
        "sparsity_structure": structure,
    }
    return {"quant_method": "compressed-tensors", "sparsity_config": sparse}


def is_packed(config: dict[str, Any]) -> bool:
    """Whether a config.json says that the folder's weights are stored as bitmasks."""
    entry = (config.get("quantization_config") or {}).get("sparsity_config") or {}
    return isinstance(entry, dict) and entry.get("format") == FORMAT


def unpacked(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with the same weights, dense, cached by the SHA-256 of the packed files.

    Raises UserError for a part that is missing, or that does not fit the others.
    """
    from regrow.checkpoint.shards import weight_files

    files = [folder / name for name in weight_files(folder)]
    key = stage_dir.digest([identity.of_file(path).sha256 for path in files], config)
    name = f"{folder.resolve().name}-{key[:16]}"
    write = partial(_write, folder, config)
    return cached_model(name, f"unpacking the bitmasks of {folder}", write)


def _write(folder: Path, config: dict[str, Any], out: Path) -> None:
    """Write the dense folder, with one weight in memory at a time."""
    from regrow.checkpoint.shards import write_shards

    stored = Packed(folder)
    layout = {name: stored.tensor(name).to("meta") for name in stored.names()}
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    tensors = ((name, stored.tensor(name)) for name in layout)
    write_shards(out, layout, tensors, MAX_SHARD_BYTES)
    stage_dir.write_json(out / "config.json", plain)
    carry(folder, out)


class Packed:
    """The tensors of a packed folder, unpacked on demand."""

    def __init__(self, folder: Path) -> None:
        from regrow.checkpoint.shards import read_headers

        self.folder = folder
        self._shard_of, self._headers = read_headers(folder)
        self._packed = [
            name.removesuffix(f".{PARTS[0]}")
            for name in self._shard_of
            if name.endswith(f".{PARTS[0]}")
        ]

    def names(self) -> list[str]:
        """Names of the dense tensors."""
        parts = {f"{module}.{part}" for module in self._packed for part in PARTS}
        plain = [name for name in self._shard_of if name not in parts]
        return [*plain, *(module + WEIGHT for module in self._packed)]

    def tensor(self, name: str) -> Tensor:
        """A dense tensor; raises UserError for parts that are missing or do not fit."""
        module = name.removesuffix(WEIGHT)
        if module not in self._packed:
            return self._read(name)
        try:
            return unpack({part: self._read(f"{module}.{part}") for part in PARTS})
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            raise UserError(
                f"{self.folder}: the bitmask of {module} is broken ({error}): write or fetch the "
                "folder again"
            ) from None

    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        ends = (entry["data_offsets"] for entry in self._headers.values())
        return sum(end - begin for begin, end in ends)

    def _read(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.folder / self._shard_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
