"""Angles between residual streams at different depths, for every pair of depths at once.

L layers, N tokens, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROWS = 256  # tokens held in float64 at once


def block_distances(streams: Sequence[Tensor]) -> Tensor:
    """Σ_tokens arccos(cos(x^first, x^(last+1))) / π of every block of layers [L, L].

    `streams` are the L + 1 residual streams [N, H]: the embedding, then each layer's output. The
    entry [last, first] is the block of the layers first to last; 0 where first > last. A token
    whose stream is all zero is at a right angle to every other.
    """
    layers = len(streams) - 1
    # In float32 the angle of a block that does nothing would be rounding, up to 5e-4.
    exact = torch.float32 if streams[0].device.type == "mps" else torch.float64
    total = torch.zeros(layers, layers, dtype=exact, device=streams[0].device)
    for rows in zip(*(stream.split(ROWS) for stream in streams), strict=True):
        x_NDH = torch.nn.functional.normalize(torch.stack(rows, 1).to(exact), dim=-1)
        cosine_NDD = (x_NDH @ x_NDH.transpose(1, 2)).clamp_(-1, 1)
        total += cosine_NDD[:, 1:, :-1].arccos_().sum(0)
    return total.div_(math.pi).tril_()
