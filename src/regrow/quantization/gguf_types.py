"""GGUF's types: which a tensor gets, what a misfit falls back to, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from regrow.errors import UserError, nearest

DIRECT = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Written here, by the gguf package."""
BY_LLAMA_CPP = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
)
"""Mixes of types that llama.cpp's quantizer chooses."""
NAMES = (*DIRECT, *BY_LLAMA_CPP)
PLAIN = ("F32", "F16", "BF16")
K_BLOCK = 256
INSTEAD_OF = {"Q5_0": "Q4_K", "Q5_1": "Q5_K", "Q8_0": "Q6_K", "IQ4_NL": "Q3_K", "Q4_0": "Q3_K"}
"""In a file of K-quants: what a tensor of this type would have been with rows of whole blocks."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """As in torch: rows before columns."""
    type: str
    """Name of its GGML type."""

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        return bytes_of(self.shape, self.type)


@dataclass(frozen=True)
class Fallback:
    """Tensors whose rows are no multiple of a type's block, so that they got another one."""

    columns: int
    wanted: str
    got: str
    tensors: int
    bytes: int
    more: int
    """Bytes more than the wanted type would take, if it could."""

    def __str__(self) -> str:
        return (
            f"{self.tensors} tensors with rows of {self.columns} (no multiple of "
            f"{block_of(self.wanted)[0]}): {self.got} instead of {self.wanted}, "
            f"{self.bytes / 1e6:.2f} MB, {self.more / 1e6:.2f} MB more"
        )


def known(name: str) -> str:
    """The type's name as llama.cpp spells it; raises ValueError for one that is not written."""
    for each in NAMES:
        if each.lower() == name.lower():
            return each
    raise ValueError(f"no type named {name!r}{nearest(name.upper(), NAMES)}; there are: {_list()}")


def block_of(type_name: str) -> tuple[int, int]:
    """Weights of a block, and its bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]


def bytes_of(shape: tuple[int, ...], type_name: str) -> int:
    """Bytes of a tensor of this shape; its rows must be whole blocks."""
    block, size = block_of(type_name)
    assert shape[-1] % block == 0, (shape, type_name)
    return math.prod(shape) // block * size


def type_of(name: str, shape: tuple[int, ...], wanted: str, head: str) -> str:
    """The type of a tensor in a file of `wanted`, one of DIRECT; `head` names the output's tensor.

    Vectors and routers stay in F32, which llama.cpp computes them in. Rows that are no multiple of
    the block take F16. The head, also an embedding that serves as one, gets Q8_0 where the
    others have fewer bits.
    """
    if len(shape) == 1 or ".ffn_gate_inp." in name:
        return "F32"
    if wanted in PLAIN:
        return wanted
    if shape[-1] % block_of(wanted)[0]:
        return "F16"
    return "Q8_0" if name == head else wanted


def fallbacks(tensors: Iterable[Stored], wanted: str) -> list[Fallback]:
    """What fell back in a file of type `wanted`, by length of row and type."""
    found: dict[tuple[int, str, str], list[Stored]] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1 and (nominal := _nominal(tensor, wanted)) != tensor.type:
            found.setdefault((tensor.shape[-1], nominal, tensor.type), []).append(tensor)
    return [_fallback(*key, some) for key, some in sorted(found.items())]


def _nominal(tensor: Stored, wanted: str) -> str:
    """The type that the tensor would have if its rows were whole blocks."""
    if wanted in PLAIN or tensor.type == "F32":
        return tensor.type
    if wanted in DIRECT:
        return wanted if tensor.type == "F16" else tensor.type
    if tensor.shape[-1] % K_BLOCK == 0:
        return tensor.type
    return INSTEAD_OF.get(tensor.type, wanted[:4])


def _fallback(columns: int, wanted: str, got: str, tensors: list[Stored]) -> Fallback:
    block, size = block_of(wanted)
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    taken = sum(tensor.bytes for tensor in tensors)
    more = taken - weights * size // block
    return Fallback(columns, wanted, got, len(tensors), taken, more)


def bits_per_weight(tensors: Iterable[Stored]) -> float:
    """Bits of all tensors ÷ their weights."""
    every = list(tensors)
    return 8 * sum(t.bytes for t in every) / sum(math.prod(t.shape) for t in every)


def check_holds(shapes: dict[str, tuple[int, ...]], wanted: str) -> None:
    """Raise UserError when more than half of the weights lie in rows that the type cannot hold.

    A K-quant falls back to a type with blocks of 32 first, which most rows can be held in.
    """
    if wanted in PLAIN:
        return
    matrices = {shape for shape in shapes.values() if len(shape) > 1}
    block = block_of(wanted)[0] if wanted in DIRECT else 32
    weights: dict[int, int] = {}
    for shape in shapes.values():
        if shape in matrices and shape[-1] % block:
            weights[shape[-1]] = weights.get(shape[-1], 0) + math.prod(shape)
    whole = sum(math.prod(shape) for shape in shapes.values() if shape in matrices)
    if 2 * sum(weights.values()) > whole:
        columns = ", ".join(map(str, sorted(weights)))
        share = sum(weights.values()) / whole
        raise UserError(
            f"type {wanted} packs {block} weights of a row, and {share:.0%} "
            f"of this model's are in rows of {columns}, which is no multiple of it: use "
            f"{', '.join(PLAIN)}, or prune to widths that are a multiple of {block}"
        )


def _list() -> str:
    return ", ".join(NAMES)
