"""Caches of a tiny teacher, and what they are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_distillation import CONFIG, OPTIONS, data
from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.stages.cache import CacheConfig
from regrow.stages.cache.stage import cache
from regrow.training.head import Head

TOKENS = CONFIG.tokens
"""As many as the tiny distillation takes."""


def make_cache(place: Path, out: Path, **fields: Any) -> Path:
    """A cache of the place's teacher for its tiny distillation."""
    config_fields = {"tokens": TOKENS, "heldout_sequences": CONFIG.heldout_sequences, **fields}
    return cache(place / "teacher", data(place), out, CacheConfig(**config_fields), OPTIONS)


def states_and_head(
    tokens: int = 40, hidden: int = 16, vocabulary: int = 97, seed: int = 0
) -> tuple[Tensor, Head]:
    """Random final hidden states and a head whose logits differ by a lot."""
    draw = torch.Generator().manual_seed(seed)
    states_NH = torch.randn(tokens, hidden, generator=draw)
    return states_NH, Head(torch.randn(vocabulary, hidden, generator=draw) * 0.7)


def exact_p(states_NH: Tensor, head: Head, vocab_size: int) -> Tensor:
    """Slow and obvious: softmax over the first ids in float64."""
    return (states_NH.double() @ head.weight_VH.double().T)[:, :vocab_size].softmax(-1)


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a cache but the manifest, which has times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
