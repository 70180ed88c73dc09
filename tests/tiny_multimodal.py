"""Tiny random multimodal folders: a text model, a vision tower and what joins them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_tokenizer import tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
IMAGE = 5
"""The token id that stands for a part of an image."""
FIELDS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            "sliding_window": 7,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "mistral3": {
        "vision_config": {"head_dim": 8},
        "spatial_merge_size": 2,
        "image_token_index": IMAGE,
        "tie_word_embeddings": False,
    },
    "qwen3_5": {
        "text_config": {
            "num_hidden_layers": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
        },
        "vision_config": {
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 48,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        },
        "image_token_id": IMAGE,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
    },
}


def write_multimodal(folder: Path, model_type: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random multimodal model with a tokenizer; no tensor is constant."""
    tokenizer, fields = tiny_tokenizer(), FIELDS[model_type]
    kind = CONFIG_MAPPING[model_type]
    plain = kind().to_dict()
    more = {k: v for k, v in fields.items() if k not in ("text_config", "vision_config")}
    text = {**plain["text_config"], **TEXT, "vocab_size": len(tokenizer)}
    text.pop("layer_types", None)
    text |= fields.get("text_config", {})
    vision = {**plain["vision_config"], **VISION, **fields.get("vision_config", {})}
    config = kind.from_dict({**plain, **more, "text_config": text, "vision_config": vision})
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def logits_with_image(model: PreTrainedModel) -> torch.Tensor:
    """Logits [1, T, V] of a text with one random image in it."""
    draw = torch.Generator().manual_seed(1)
    count = 4
    ids = torch.tensor([[9, 10, *[IMAGE] * count, 11, 12]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    name = model.config.model_type
    if name == "qwen3_5":
        ids = torch.tensor([[9, 7, *[IMAGE] * count, 8, 12]])
        grid = torch.tensor([[1, 4, 4]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= {"pixel_values": torch.randn(16, 3 * 4 * 4, generator=draw)}
        inputs |= {"image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}
    else:
        inputs["pixel_values"] = torch.randn(1, 3, 28, 28, generator=draw)
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).int()
    if name == "mistral3":
        inputs["image_sizes"] = torch.tensor([[28, 28]])
    found: torch.Tensor = model(**inputs).logits
    return found
