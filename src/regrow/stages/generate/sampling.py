"""Draws of tokens that do not depend on the batch: each prompt has random numbers of its own.

Shapes: B prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Sampler(LogitsProcessor):
    """Leaves one id of each row: drawn from softmax(logits / temperature), cut to its top_p.

    By inversion of the cumulated distribution at one uniform number per row and token. The cut is
    to the fewest ids that together reach top_p (Holtzman et al., 2020, arXiv:1904.09751).
    """

    def __init__(self, keys: Sequence[str], seed: int, temperature: float, top_p: float) -> None:
        self.draws = [Random(f"{seed}/{key}") for key in keys]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores [B, V] with all but the drawn ids at −∞."""
        uniform_B = torch.tensor([draw.random() for draw in self.draws], dtype=torch.float64)
        chosen_B = draw_ids(scores.float() / self.temperature, self.top_p, uniform_B)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen_B[:, None], 0.0)


def draw_ids(logits_BV: Tensor, top_p: float, uniform_B: Tensor) -> Tensor:
    """The id [B] at which the cumulated distribution passes each uniform number in [0, 1)."""
    probability_BV = logits_BV.softmax(-1)
    order_BV = None
    if top_p < 1:
        probability_BV, order_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = probability_BV.cumsum(-1) - probability_BV
        probability_BV = probability_BV.masked_fill(before_BV >= top_p, 0.0)
    # float64 where there is any: in float32 a sum over a vocabulary is off by 1e-6.
    wide = torch.float32 if logits_BV.device.type == "mps" else torch.float64
    sum_BV = probability_BV.cumsum(-1, dtype=wide)
    at_B1 = uniform_B.to(wide).to(sum_BV.device)[:, None] * sum_BV[:, -1:]
    last_B1 = (probability_BV > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    place_B1 = torch.searchsorted(sum_BV, at_B1, right=True).minimum(last_B1)
    found_B1 = place_B1 if order_BV is None else order_BV.gather(-1, place_B1)
    return found_B1.squeeze(-1)
