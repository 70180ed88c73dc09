"""How the feature losses measure two states, and read them through the output heads.

Shapes: N tokens, H hidden channels, D depths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.head import head_loss
from regrow.training.layer_mapping import LayerMapping, ModelFeatures
from regrow.training.loss_weights import LossWeights


def relative_error(s_NH: Tensor, t_NH: Tensor) -> Tensor:
    """Σ_tokens |s − t|² / |t|².

    Relative to each token's own teacher state, because a few first tokens are a thousand times
    larger than the others.
    """
    return ((s_NH - t_NH).square().sum(-1) / t_NH.square().sum(-1).clamp_min(1e-12)).sum()


def through_heads(
    student: ModelFeatures,
    teacher: ModelFeatures,
    match: LayerMapping,
    mask_BT: Tensor,
    divergence: str,
) -> Tensor:
    """Σ_tokens mean_depths of a divergence of the states' next-token distributions, in nats.

    All depths go through one chunked pass, so that [tokens, vocabulary] is never made.
    """
    s_NH = [student.norm(student.layers[ours + 1][mask_BT]) for ours, _ in match.lens]
    t_NH = [teacher.norm(teacher.layers[theirs + 1][mask_BT]) for _, theirs in match.lens]
    s_DNH, t_DNH = torch.cat(s_NH), torch.cat(t_NH)
    no_targets = torch.zeros(len(s_DNH), dtype=torch.int64, device=s_DNH.device)
    mix = LossWeights({divergence: 1.0})
    total, _ = head_loss(s_DNH, student.head, no_targets, mix, t_DNH, teacher.head)
    return total / len(match.lens)
