"""A model's sizes and constants, as the keys of a GGUF file."""

from __future__ import annotations

from typing import Any

from regrow.checkpoint import Checkpoint
from regrow.families import Family
from regrow.stages.export import limits
from regrow.stages.export.rope import write_rope

QUANTIZATION_VERSION = 2
"""Of GGML's block formats."""
MOST_PERIODIC = 6
"""What llama.cpp takes for Gemma 3's period of full attention when the file says nothing."""


def write(writer: Any, checkpoint: Checkpoint, family: Family, config: Any) -> None:
    """Add the architecture's keys to a GGUFWriter."""
    raw = checkpoint.config
    sizes = family.sizes(raw)
    assert family.gguf is not None
    writer.add_vocab_size(sizes["vocab"])
    writer.add_context_length(limits.context(config, family.gguf)[0])
    writer.add_embedding_length(sizes["hidden"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(sizes["mlp"] if "mlp" in sizes else sizes["expert_mlp"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_layer_norm_rms_eps(family.value(raw, "rms_norm_eps"))
    write_rope(writer, config, sizes["head_dim"])
    if "experts" in sizes:
        writer.add_expert_count(sizes["experts"])
        writer.add_expert_used_count(int(family.value(raw, "num_experts_per_tok")))
    if "experts" in sizes and "mlp" in sizes:
        writer.add_expert_feed_forward_length(sizes["expert_mlp"])
    if family.gguf == "gemma3":
        _write_window(writer, config)


def _write_window(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    period = limits.sliding_period(config)
    if period != MOST_PERIODIC:
        writer.add_sliding_window_pattern(period)


def write_general(writer: Any, name: str, file_type: int, licence: str | None) -> None:
    """Add what describes the file: its name, type and, where it is known, licence."""
    writer.add_type("model")
    writer.add_name(name)
    if licence is not None:
        writer.add_license(licence)
    writer.add_file_type(file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
