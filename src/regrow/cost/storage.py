"""Bytes of a model: on disk in each storage format, and in memory when it generates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from regrow.families import Family
from regrow.quantization import formats
from regrow.quantization.formats import StorageFormat, StoredTensor, fitting

CACHE_BYTES = 2
"""Bytes of a cached key or value: 16 bits, as in llama.cpp and bf16 models."""
PROMPT_TOKENS = 512
"""Number of prompt tokens computed at once, equal to llama.cpp's default n_ubatch."""


def stored(
    family: Family, config: dict[str, Any], format: str, sizes: dict[str, int] | None = None
) -> Iterator[StoredTensor]:
    """The storage of each tensor of a model in a format; `sizes` override those of the config."""
    wanted_by = formats.find(format)
    full = {**family.sizes(config), **(sizes or {})}
    for template, row in family.tensors.items():
        if not family.exists(row, config):
            continue
        shape = row.shape(full)
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


def cache_bytes_per_token(
    family: Family, config: dict[str, Any], sizes: dict[str, int] | None = None
) -> int:
    """Bytes of a token's keys and values in all layers: 2 · layers · kv_heads · head_dim · 2."""
    full = {**family.sizes(config), **(sizes or {})}
    return 2 * full["layers"] * full["kv_heads"] * full["head_dim"] * CACHE_BYTES


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
    cache = context_length * cache_bytes_per_token(family, config, sizes)
    tokens = min(PROMPT_TOKENS, context_length)
    heads = (full["heads"] + 2 * full["kv_heads"]) * full["head_dim"]
    inside = full.get("mlp", 0)
    if "experts" in full:
        inside = max(inside, full["expert_mlp"] * family.value(config, "num_experts_per_tok"))
    wide = tokens * (3 * full["hidden"] + heads + 2 * inside + context_length)
    return file_bytes(family, config, format, sizes) + cache + 4 * (wide + full["vocab"])


def fallbacks(
    family: Family, config: dict[str, Any], format: str, sizes: dict[str, int] | None = None
) -> list[str]:
    """A line for each type that rows do not fit: the tensors, the type they get, and the cost."""
    lines = formats.fallback_lines(stored(family, config, format, sizes))
    return [f"{format}: {line}" for line in lines]
