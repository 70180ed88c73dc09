"""The usual number of tokens in an optimizer step."""

from __future__ import annotations

STEPS = {3e5: 512, 1e6: 1024, 5e6: 2048, 5e7: 16384, 1e9: 65536}
"""Tokens of a step for budgets below a number of tokens."""
LARGEST = 3 * 1024 * 1024


def usual_batch(tokens: float) -> int:
    """Tokens of a step for a budget.

    Up to a few million by our own runs (docs/teaching.md): steps of 512 tokens, 1,024 from 300 k,
    2,048 from a million. Above that no run of ours decides: 65,536, and from a billion on 3·10⁶ as
    NVIDIA Model-Optimizer does.
    """
    return next((size for limit, size in STEPS.items() if tokens < limit), LARGEST)
