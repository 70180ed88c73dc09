"""What a model costs: parameters, operations and seconds, bytes on disk and in memory.

An operation is a multiplication or an addition. A forward pass takes 2 for each parameter that a
token runs through, a backward pass 2 for the gradients of the activations and 2 for those of the
weights (Kaplan et al., 2020, arXiv:2001.08361, section 2.1). Times are those of matrix products at
the rate measured on this machine, and so the least that is possible.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.families import Family, rows
from regrow.quantization import formats
from regrow.quantization.formats import StorageFormat, StoredTensor, fitting

FORWARD = 2
"""Operations for each parameter and token of a forward pass."""
BACKWARD = {"none": 4, "frozen": 2, "lora": 2, "qlora": 2}
"""Operations of a backward pass, by adapter: frozen weights need no gradient of their own."""
TRAINING_BYTES = {"none": 16.0, "lora": 2.0, "qlora": 0.6}
"""Bytes for each parameter that is trained, by adapter: float32 weight, gradient and the two
moments of Adam; a frozen weight in 16 or about 4 bits."""
CACHE_BYTES = 2
"""Bytes of a cached key or value: 16 bits, as llama.cpp and bf16 models keep them."""
PROMPT_TOKENS = 512
"""Tokens of a prompt that are computed at once, as llama.cpp's n_ubatch."""


def parameters(checkpoint: Checkpoint) -> int:
    """Parameters, tied weights counted once."""
    return families.of(checkpoint).count(checkpoint.config)


def active(checkpoint: Checkpoint) -> int:
    """Parameters that one token runs through: of the experts only those its router chooses."""
    return families.of(checkpoint).active(checkpoint.config)


@cache
def matmul_rate() -> float:
    """Operations per second of a bf16 matrix product of a usual size here; measured once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024, 1024, dtype=torch.bfloat16, device=device)
    _ = (a @ a)[0, 0].item()
    start = time.perf_counter()
    for _ in range(4):
        _ = (a @ a)[0, 0].item()
    return 4 * 2 * 1024**3 / (time.perf_counter() - start)


def seconds_for(tokens: float, operations: float) -> float:
    """Seconds for `tokens` tokens of so many operations each, at the rate of this machine."""
    return tokens * operations / matmul_rate()


def forward_seconds(checkpoint: Checkpoint, tokens: float) -> float:
    """Seconds of a forward pass over `tokens` tokens."""
    return seconds_for(tokens, FORWARD * active(checkpoint))


def training_operations(student: int, teacher: int = 0, adapter: str = "none") -> int:
    """Operations for each token of a distillation, by parameters of student and teacher."""
    return FORWARD * teacher + (FORWARD + BACKWARD[adapter]) * student


def training_bytes(parameters: int, adapter: str = "none") -> float:
    """Bytes of weights, gradients and optimizer of a student that is trained."""
    return TRAINING_BYTES[adapter] * parameters


def stored(
    family: Family, config: dict[str, Any], format: str, sizes: dict[str, int] | None = None
) -> Iterator[StoredTensor]:
    """How each tensor of a model is stored in a format; `sizes` override those of the config."""
    wanted_by = formats.find(format)
    full = {**family.sizes(config), **(sizes or {})}
    for template, row in family.tensors.items():
        if not family.exists(row, config):
            continue
        shape = tuple(rows(axis, full) for axis in row.axes)
        count = family.copies(template, config, full)
        for wanted, some in _types(family, template, config, wanted_by, full, count).items():
            if some:
                yield StoredTensor(template, shape, wanted, fitting(wanted, shape[-1]), some)


def role_of(family: Family, template: str, config: dict[str, Any]) -> str:
    """What a tensor is to a storage format: see `StorageFormat.type_of`."""
    axes = family.tensors[template].axes
    if len(axes) == 1 or axes[0] == "experts":
        return "other"
    if template == family.head:
        return "head"
    if template == family.embedding:
        return "embedding" if family.exists(family.tensors[family.head], config) else "head"
    if axes[1] in ("mlp", "expert_mlp"):
        return "down_proj"
    module = template.split(".")[-2]
    return "v_proj" if module == "qkv_proj" else module


def _types(
    family: Family,
    template: str,
    config: dict[str, Any],
    format: StorageFormat,
    sizes: dict[str, int],
    count: int,
) -> dict[str, int]:
    """Number of tensors of each type among the `count` of one row of a family's table."""
    by_layer = format.layers_by_type(role_of(family, template, config), sizes)
    (first, _), *others = by_layer.items()
    found = {kind: layers * count // max(1, sizes["layers"]) for kind, layers in others}
    return {first: count - sum(found.values()), **found}


def file_bytes(
    family: Family, config: dict[str, Any], format: str, sizes: dict[str, int] | None = None
) -> int:
    """Bytes of all tensors in a format, tied ones once; without the file's header and tokenizer."""
    return sum(tensor.bytes for tensor in stored(family, config, format, sizes))


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
    tokens = min(PROMPT_TOKENS, context_length)
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
    """A line for each type that rows do not fit: which tensors, their type, and what it costs."""
    lines = formats.fallback_lines(stored(family, config, format, sizes))
    return [f"{format}: {line}" for line in lines]
