"""Operations of forward and backward passes, and the seconds that they take on this machine.

An operation is a multiplication or an addition. For each parameter that a token uses, a forward
pass takes 2 operations, and a backward pass takes 2 for the gradients of the activations and 2 for
those of the weights (Kaplan et al., 2020, arXiv:2001.08361, section 2.1). Times assume matrix
products at the rate measured on this machine; they are lower bounds.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.families import Family
from regrow.runtime.precision import half

FORWARD = 2
"""Operations for each parameter and token of a forward pass."""
BACKWARD = {"none": 4, "frozen": 2, "lora": 2, "qlora": 2}
"""Operations of a backward pass, by adapter: frozen weights need no gradient of their own."""


def parameters(checkpoint: Checkpoint) -> int:
    """Number of parameters; tied weights are counted once."""
    return families.of(checkpoint).count(checkpoint.config)


def active(checkpoint: Checkpoint) -> int:
    """Number of parameters that one token uses, with only the experts to which it is routed."""
    return families.of(checkpoint).active(checkpoint.config)


@cache
def matmul_rate() -> float:
    """Operations per second of a matrix product in the data type in which stages compute here.

    The fastest of four, because other work on the machine can only slow one down; measured once.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a = torch.randn(1024, 1024, device=device).to(half(device))
    times = []
    for _ in range(5):  # the first one also sets up
        start = time.perf_counter()
        _ = (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times[1:])


def seconds_for(tokens: float, operations: float) -> float:
    """Seconds for `tokens` tokens with `operations` operations each, at this machine's rate."""
    return tokens * operations / matmul_rate()


def forward_seconds(checkpoint: Checkpoint, tokens: float) -> float:
    """Seconds of a forward pass over `tokens` tokens."""
    return seconds_for(tokens, FORWARD * active(checkpoint))


def training_operations(student: int, teacher: int = 0, adapter: str = "none") -> int:
    """Operations per token of a distillation, from the parameters of student and teacher."""
    return FORWARD * teacher + (FORWARD + BACKWARD[adapter]) * student


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
