"""What a model costs: operations per token, bytes on disk in a named format, bytes in memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.families import Family, rows
from regrow.quantization import formats
from regrow.quantization.formats import TYPES


def parameters(checkpoint: Checkpoint) -> int:
    """Parameters, tied weights counted once."""
    return families.of(checkpoint).count(checkpoint.config)


def active(checkpoint: Checkpoint) -> int:
    """Parameters that one token runs through; a forward pass takes two operations for each."""
    return families.of(checkpoint).active(checkpoint.config)


def matmul_rate() -> float:
    """Operations per second of a bf16 matrix product of a usual size here, measured now."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024, 1024, dtype=torch.bfloat16, device=device)
    _ = (a @ a)[0, 0].item()
    start = time.perf_counter()
    for _ in range(4):
        _ = (a @ a)[0, 0].item()
    return 4 * 2 * 1024**3 / (time.perf_counter() - start)


CACHE_BYTES = 2  # of a key or value: f16, as llama.cpp and bf16 models keep them
CHUNK = 512  # tokens of a prompt that are computed at once, as llama.cpp's n_ubatch


@dataclass(frozen=True)
class StoredTensors:
    """All tensors of one row of a family's table that are stored in one type."""

    template: str
    tensors: int
    rows: int
    columns: int
    wanted: str
    """Type that the format has for them."""
    given: str
    """Type that their rows fit."""

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return self.tensors * TYPES[self.given].bytes(self.rows, self.columns)


def stored(
    family: Family, config: dict[str, Any], format: str, sizes: dict[str, int] | None = None
) -> Iterator[StoredTensors]:
    """How each tensor of a model is stored in a format; `sizes` override those of the config."""
    full = {**family.sizes(config), **(sizes or {})}
    for template, row in family.tensors.items():
        if not family.exists(row, config):
            continue
        shape = [rows(axis, full) for axis in row.axes]
        for wanted, count in _types(template, len(shape), family, config, format, full):
            if count:
                given = formats.fitting(wanted, shape[-1])
                yield StoredTensors(
                    template, count, math.prod(shape[:-1]), shape[-1], wanted, given
                )


def file_bytes(
    family: Family, config: dict[str, Any], format: str, sizes: dict[str, int] | None = None
) -> int:
    """Bytes of all tensors in a format, tied ones once; without the file's header and tokenizer."""
    return sum(found.bytes for found in stored(family, config, format, sizes))


def ram_bytes(
    family: Family,
    config: dict[str, Any],
    format: str,
    context_length: int,
    sizes: dict[str, int] | None = None,
) -> int:
    """Bytes to generate at `context_length` tokens, batch 1: weights + KV cache + activations.

    KV cache: 2 · layers · kv_heads · head_dim · context · 2 bytes. Activations: float32 of one
    layer for 512 tokens (residual and its norm, queries, keys, values, gate and up, those of all
    experts that a token is routed to), the attention scores of 512 × context in one head's turn,
    and one row of logits.
    """
    full = {**family.sizes(config), **(sizes or {})}
    cache = 2 * full["layers"] * full["kv_heads"] * full["head_dim"] * context_length * CACHE_BYTES
    tokens = min(CHUNK, context_length)
    heads = (full["heads"] + 2 * full["kv_heads"]) * full["head_dim"]
    inside = full.get("mlp", 0)
    if "experts" in full:
        inside = max(inside, full["expert_mlp"] * family.value(config, "num_experts_per_tok"))
    wide = tokens * (3 * full["hidden"] + heads + 2 * inside + context_length)
    return file_bytes(family, config, format, sizes) + cache + 4 * (wide + full["vocab"])


def forward_flops(family: Family, config: dict[str, Any], tokens: int, past: int = 0) -> int:
    """Operations to read `tokens` after `past` cached ones, batch 1, with the last one's logits.

    2 · weights · tokens, of all weights that a token runs through but embedding and head; 4 ·
    layers · heads · head_dim · Σ_t (past + t) for scores and sums of full attention; 2 · vocab ·
    hidden for the head.
    """
    full = family.sizes(config)
    table = full["vocab"] * full["hidden"]
    tables = 1 + family.exists(family.tensors[family.head], config)
    weights = family.active(config) - tables * table
    seen = tokens * past + tokens * (tokens + 1) // 2
    attention = 4 * full["layers"] * full["heads"] * full["head_dim"] * seen
    return 2 * weights * tokens + attention + 2 * table


def fallbacks(
    family: Family, config: dict[str, Any], format: str, sizes: dict[str, int] | None = None
) -> list[str]:
    """A line for each type that rows do not fit: which tensors, what they get, what it costs."""
    groups: dict[tuple[str, str, int], list[StoredTensors]] = {}
    for found in stored(family, config, format, sizes):
        if found.wanted != found.given:
            groups.setdefault((found.wanted, found.given, found.columns), []).append(found)
    lines = []
    for (wanted, given, columns), some in groups.items():
        block, size = TYPES[wanted].block, TYPES[wanted].size
        fitted = sum(s.tensors * s.rows * s.columns * size / block for s in some)
        extra = sum(s.bytes for s in some) - fitted
        names = ", ".join(dict.fromkeys(s.template.split(".")[-2] for s in some))
        lines.append(
            f"{format}: rows of {columns} are no multiple of {block}: {given} in place of {wanted} "
            f"for {sum(s.tensors for s in some)} tensors ({names}), {extra / 1e6:+,.1f} MB"
        )
    return lines


def _types(
    template: str,
    axes: int,
    family: Family,
    config: dict[str, Any],
    format: str,
    sizes: dict[str, int],
) -> list[tuple[str, int]]:
    """(type, number of tensors) of one row of the table."""
    found = formats.find(format)
    count = family.copies(template, config, sizes)
    if axes == 1:
        return [(found.other, count)]
    if template == family.head:
        return [(found.head, count)]
    if template == family.embedding:
        tied = not family.exists(family.tensors[family.head], config)
        return [(found.head if tied else found.embedding, count)]
    module = template.split(".")[-2]
    plain = found.parts.get(module, found.linear)
    more = 0
    if module in found.more:
        more = formats.layers_with_more(sizes["layers"]) * count // max(1, sizes["layers"])
    return [(plain, count - more), (found.more.get(module, plain), more)]
