"""Choice of shape: `choice.py` joins untrained rounds, timing and short distillations."""

from __future__ import annotations

from regrow.search.choice import SHOWN, check_keep_params, choose_shape, prune, to_try
from regrow.search.rounds import HANDFUL, blocks_for, passes_for

__all__ = [
    "HANDFUL",
    "SHOWN",
    "blocks_for",
    "check_keep_params",
    "choose_shape",
    "passes_for",
    "prune",
    "to_try",
]
