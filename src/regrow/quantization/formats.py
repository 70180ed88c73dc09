"""Named weight formats and what a tensor takes in each: blocks, bytes, and what a misfit falls to.

A GGUF type packs a block of weights of one row into a fixed number of bytes (the sizes are those of
the gguf package's GGML_QUANT_SIZES). Which type a tensor gets in a named mix, and which one where
its rows are no multiple of the block, follows llama.cpp's quantizer (llama_tensor_get_type); where
`regrow export` writes the file itself (no K-quants), the head has q8_0. The
int4 and int8 formats are those of compressed-tensors: symmetric, a 16-bit scale per group or row,
with embedding, head and norms left in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from regrow.errors import unknown


@dataclass(frozen=True)
class TensorType:
    """How one tensor is stored."""

    block: int
    """Weights of a row that are packed together."""
    size: int
    """Bytes of a block."""
    fallback: str = ""
    """Type of a tensor whose rows are no multiple of `block`."""
    per_row: int = 0
    """Bytes for every row, for a scale."""

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of a tensor of this shape; its rows must be whole blocks."""
        assert columns % self.block == 0, (columns, self.block)
        return rows * (columns // self.block * self.size + self.per_row)


TYPES = {
    "f32": TensorType(1, 4),
    "f16": TensorType(1, 2),
    "bf16": TensorType(1, 2),
    "int8": TensorType(1, 1, per_row=2),
    "q4_0": TensorType(32, 18, "f16"),
    "q4_1": TensorType(32, 20, "f16"),
    "q5_0": TensorType(32, 22, "f16"),
    "q5_1": TensorType(32, 24, "f16"),
    "q8_0": TensorType(32, 34, "f16"),
    "q4_k": TensorType(256, 144, "q5_0"),
    "q5_k": TensorType(256, 176, "q5_1"),
    "q6_k": TensorType(256, 210, "q8_0"),
    "int4-g32": TensorType(32, 16 + 2, "int8"),
    "int4-g64": TensorType(64, 32 + 2, "int4-g32"),
    "int4-g128": TensorType(128, 64 + 2, "int4-g64"),
}


@dataclass(frozen=True)
class StorageFormat:
    """Which type each kind of tensor gets."""

    linear: str
    embedding: str
    head: str
    """Also of an embedding that serves as the head."""
    other: str
    """Norms and biases."""
    parts: dict[str, str] = field(default_factory=dict)
    """Type by the end of a module's name, where it is not `linear`."""
    more: dict[str, str] = field(default_factory=dict)
    """Type by the end of a module's name in the layers that get more bits."""


def _gguf(linear: str, **more: dict[str, str]) -> StorageFormat:
    head = "q6_k" if linear.endswith("_k") else "q8_0"
    return StorageFormat(linear, linear, head, "f32", **more)


FORMATS = {
    "f32": StorageFormat("f32", "f32", "f32", "f32"),
    "f16": StorageFormat("f16", "f16", "f16", "f16"),
    "bf16": StorageFormat("bf16", "bf16", "bf16", "bf16"),
    "int8": StorageFormat("int8", "bf16", "bf16", "bf16"),
    "q8_0": _gguf("q8_0"),
    "q6_k": _gguf("q6_k"),
    "q5_1": _gguf("q5_1"),
    "q5_0": _gguf("q5_0"),
    "q4_1": _gguf("q4_1"),
    "q4_0": _gguf("q4_0"),
    "q5_k_m": _gguf(
        "q5_k", more={"v_proj": "q6_k", "down_proj": "q6_k"}, parts={"qkv_proj": "q6_k"}
    ),
    "q4_k_m": _gguf(
        "q4_k", more={"v_proj": "q6_k", "down_proj": "q6_k"}, parts={"qkv_proj": "q5_k"}
    ),
    **{f"int4-g{n}": StorageFormat(f"int4-g{n}", "bf16", "bf16", "bf16") for n in (32, 64, 128)},
}


def find(name: str) -> StorageFormat:
    """The format of that name; raises UserError when there is none."""
    if name.lower() not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name.lower()]


def fitting(wanted: str, columns: int) -> str:
    """The type that rows of `columns` weights get when `wanted` is asked for."""
    while columns % TYPES[wanted].block:
        wanted = TYPES[wanted].fallback
    return wanted


def layers_with_more(count: int) -> int:
    """In how many of `count` layers llama.cpp's _M mixes give more bits: about a half.

    The first and the last eighth, and every third in between.
    """
    eighth = count // 8
    return sum(i < eighth or i >= 7 * count // 8 or (i - eighth) % 3 == 2 for i in range(count))
