"""Tiny models that llama.cpp can hold, one per family and kind of rotation, and their export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_folders import write_model
from tiny_models import NAMES, tiny_ids

from regrow import ExportConfig, export, families
from regrow.checkpoint import Checkpoint

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
ROPE: dict[str, Any] = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
FLAT = {"use_sliding_window": False, "sliding_window": None}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 24}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama3 rotation": ("llama", {"rope_parameters": {**ROPE, **LLAMA3, "rope_type": "llama3"}}),
    "linear rotation": (
        "llama",
        {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}},
    ),
    "yarn rotation": (
        "qwen2",
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}, **FLAT},
    ),
    "yarn with another attention": (
        "llama",
        {
            "head_dim": 16,
            "rope_parameters": {
                **ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
            },
        },
    ),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("qwen2", FLAT),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "gemma3": ("gemma3_text", {"head_dim": 24}),
    "gemma3 of the 27B's scale": (
        "gemma3_text",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 10,
            "num_hidden_layers": 7,
            "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
    "phi3": ("phi3", {}),
    "phi3, tied, long rotation": (
        "phi3",
        {
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "short_factor": [1 + 0.1 * n for n in range(8)],
                "long_factor": [2 + 0.3 * n for n in range(8)],
            },
        },
    ),
    "mixtral": ("mixtral", {"head_dim": 16, "sliding_window": None}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 24, "decoder_sparse_step": 1, "moe_intermediate_size": 32},
    ),
}
TRIED = {model_type for model_type, _ in CASES.values()}
CASES |= {
    name: (name, {}) for name in NAMES if families.get(name).gguf is not None and name not in TRIED
}


def write_case(folder: Path, case: str, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A tiny checkpoint of the case, its rows multiples of 32."""
    model_type, fields = CASES[case]
    return write_model(folder, model_type, dtype, **{**WIDE, **fields})


def exported(checkpoint: Checkpoint, out: Path, type_name: str, **fields: Any) -> Path:
    """The GGUF file of a checkpoint."""
    return export(checkpoint, out, ExportConfig(type=type_name, **fields))


def random_ids(length: int = 90) -> list[int]:
    """Token ids longer than the tiny windows."""
    ids: list[int] = tiny_ids(1, length)[0].tolist()
    return ids
