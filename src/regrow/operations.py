"""Operations: those that a token takes, and those that this machine does in a second."""

from __future__ import annotations

import time

import torch

from regrow import families
from regrow.checkpoint import Checkpoint


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
