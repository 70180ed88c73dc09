"""Measures that several feature losses use: between states, and between their distributions.

Shapes: N tokens, H hidden channels, D depths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.features import LayerMapping, ModelFeatures
from regrow.training.head import head_loss
from regrow.training.loss_weights import LossWeights


def relative_error(s_NH: Tensor, t_NH: Tensor) -> Tensor:
    """Σ_tokens |s − t|² / |t|².

    The error is relative to each token's own teacher state, because the states of a few first
    tokens are a thousand times larger than the states of the others.
    """
    return ((s_NH - t_NH).square().sum(-1) / t_NH.square().sum(-1).clamp_min(1e-12)).sum()


def through_heads(
    student: ModelFeatures,
    teacher: ModelFeatures,
    mapping: LayerMapping,
    mask_BT: Tensor,
    divergence: str,
) -> Tensor:
    """Σ_tokens mean_depths of a divergence of the states' next-token distributions, in nats.

    All depths share one chunked pass, so full logits [tokens, vocabulary] are never in memory.
    """
    s_NH = [student.norm(student.layers[layer + 1][mask_BT]) for layer, _ in mapping.lens]
    t_NH = [teacher.norm(teacher.layers[layer + 1][mask_BT]) for _, layer in mapping.lens]
    s_DNH, t_DNH = torch.cat(s_NH), torch.cat(t_NH)
    no_targets = torch.zeros(len(s_DNH), dtype=torch.int64, device=s_DNH.device)
    loss_weights = LossWeights({divergence: 1.0})
    total, _ = head_loss(s_DNH, student.head, no_targets, loss_weights, t_DNH, teacher.head)
    return total / len(mapping.lens)
