"""The key of a token block: a hash of what decides what the teacher says about it.

Shapes: B blocks, T tokens.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from regrow.data.blocks import IGNORED


def block_keys(batch: dict[str, Tensor]) -> list[bytes]:
    """SHA-256 of each block's ids, positions and of which tokens are scored: B keys of 32 bytes."""
    scored = batch["labels"] != IGNORED
    rows = torch.stack([batch["input_ids"], batch["position_ids"], scored.long()], dim=1)
    return [hashlib.sha256(row.tobytes()).digest() for row in rows.int().cpu().numpy()]
