"""Folders a stage can be run on: tiny checkpoints with their tokenizer, and text for all splits."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model
from tiny_tokenizer import SENTENCES, tiny_tokenizer

from regrow.checkpoint import Checkpoint
from regrow.data import DataConfig

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "rms_norm_eps": 1e-6}


def write_model(
    folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any
) -> Checkpoint:
    """A tiny random checkpoint with its tokenizer, whose vocabulary is exactly the tokenizer's."""
    tokenizer = tiny_tokenizer()
    overrides = {"rms_norm_eps": 1e-6, "vocab_size": len(tokenizer), **overrides}
    tiny_model(model_type, dtype, **overrides).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return Checkpoint(folder)


def set_config(folder: Path, **fields: Any) -> None:
    """Change fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def write_text(path: Path, documents: int = 300, seed: int = 0) -> Path:
    """Documents of shuffled words as .jsonl, each different, of some 40 to 120 tokens."""
    draw = random.Random(seed)
    words = " ".join(SENTENCES).split()
    rows = []
    for number in range(documents):
        text = " ".join(draw.choices(words, k=draw.randint(12, 40)))
        rows.append(json.dumps({"text": f"{number} {text}."}))
    path.write_text("\n".join(rows) + "\n")
    return path


def data_of(path: Path, **fields: Any) -> DataConfig:
    """Blocks of 32 tokens of a text; 20 % held out, 40 % for calibration."""
    config_fields = {"sources": [str(path)], "sequence_length": 32, "heldout_fraction": 0.2}
    return DataConfig.model_validate({**config_fields, "calibration_fraction": 0.4, **fields})
