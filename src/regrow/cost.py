"""Estimates a model's cost: parameters, operations and seconds, bytes on disk and in memory.

An operation is a multiplication or an addition. For each parameter that a token uses, a forward
pass takes 2 operations, and a backward pass takes 2 for the gradients of the activations and 2 for
those of the weights (Kaplan et al., 2020, arXiv:2001.08361, section 2.1). Times assume matrix
products at the rate measured on this machine; they are lower bounds.
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
"""Bytes for each parameter of the student, by adapter. Without an adapter: float32 weight, gradient
and the two moments of Adam. With one: a frozen weight in 16 or about 4 bits."""
CACHE_BYTES = 2
"""Bytes of a cached key or value: 16 bits, as in llama.cpp and bf16 models."""
PROMPT_TOKENS = 512
"""Number of prompt tokens computed at once, equal to llama.cpp's default n_ubatch."""


def parameters(checkpoint: Checkpoint) -> int:
    """Number of parameters; tied weights are counted once."""
    return families.of(checkpoint).count(checkpoint.config)


def active(checkpoint: Checkpoint) -> int:
    """Number of parameters that one token uses, with only the experts to which it is routed."""
    return families.of(checkpoint).active(checkpoint.config)


@cache
def matmul_rate() -> float:
    """Operations per second of a bf16 matrix product on this machine; measured once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024, 1024, dtype=torch.bfloat16, device=device)
    _ = (a @ a)[0, 0].item()
    start = time.perf_counter()
    for _ in range(4):
        _ = (a @ a)[0, 0].item()
    return 4 * 2 * 1024**3 / (time.perf_counter() - start)


def seconds_for(tokens: float, operations: float) -> float:
    """Seconds for `tokens` tokens with `operations` operations each, at this machine's rate."""
    return tokens * operations / matmul_rate()


def forward_seconds(checkpoint: Checkpoint, tokens: float) -> float:
    """Seconds of a forward pass over `tokens` tokens."""
    return seconds_for(tokens, FORWARD * active(checkpoint))


def training_operations(student: int, teacher: int = 0, adapter: str = "none") -> int:
    """Operations per token of a distillation, from the parameters of student and teacher."""
    return FORWARD * teacher + (FORWARD + BACKWARD[adapter]) * student


def training_bytes(parameters: int, adapter: str = "none") -> float:
    """Bytes of the weights, gradients and optimizer state of a student in training."""
    return TRAINING_BYTES[adapter] * parameters


def stored(
    family: Family, config: dict[str, Any], format: str, sizes: dict[str, int] | None = None
) -> Iterator[StoredTensor]:
    """The storage of each tensor of a model in a format; `sizes` override those of the config."""
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
    """The role of a tensor in a storage format: see `StorageFormat.type_of`."""
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
    """Number of tensors of each type among the `count` tensors of one row of a family's table."""
    by_layer = format.layers_by_type(role_of(family, template, config), sizes)
    (first, _), *others = by_layer.items()
    found = {kind: layers * count // max(1, sizes["layers"]) for kind, layers in others}
    return {first: count - sum(found.values()), **found}


def file_bytes(
    family: Family, config: dict[str, Any], format: str, sizes: dict[str, int] | None = None
) -> int:
    """Bytes of all tensors in a format, tied ones counted once, without header and tokenizer."""
    return sum(tensor.bytes for tensor in stored(family, config, format, sizes))


def ram_bytes(
    family: Family,
    config: dict[str, Any],
    format: str,
    context_length: int,
    sizes: dict[str, int] | None = None,
) -> int:
    """Bytes to generate at `context_length` tokens, batch 1: weights + KV cache + activations.

    KV cache: 2 · layers · kv_heads · head_dim · context · 2 bytes. Activations, in float32: those
    of one layer for 512 tokens (residual stream and its norm, queries, keys, values, gate and up of
    all experts to which a token is routed), the attention scores [512, context] of one head, and
    one row of logits.
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
    """Operations to compute `tokens` after `past` cached ones, batch 1, with the last one's logits.

    The sum of 2 · weights · tokens, for all weights that a token uses except embedding and head;
    4 · layers · heads · head_dim · Σ_t (past + t), for scores and weighted sums of full attention;
    and 2 · vocab · hidden, for the head.
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
    """A line for each type that rows do not fit: the tensors, the type they get, and the cost."""
    lines = formats.fallback_lines(stored(family, config, format, sizes))
    return [f"{format}: {line}" for line in lines]
