"""Minitron's activation importance (Muralidharan et al., 2024, arXiv:2407.14679, §2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.stages.profile.importance import WIDTHS, Stats, Weights

DIMS = WIDTHS
NEEDS = frozenset({"mean_abs_square_sum"})


def score(stats: Stats, weights: Weights, dim: str, generator: torch.Generator) -> Tensor:
    """sqrt(Σ_samples Σ_width (mean_tokens |x|)²): mean over the sequence, then L2 over samples.

    The mean hides activations that are large on few tokens. For a head, the paper computes the L2
    norm over its channels for each token and then the mean over tokens; here the mean over tokens
    is computed first, for each channel. MLP channels are observed after the gate, where `down_proj`
    reads them.
    """
    return stats["mean_abs_square_sum"].sum(-1).sqrt()
