"""Compares layer outputs with the teacher's (FitNets; Romero et al., 2015, arXiv:1412.6550)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.feature_losses._measures import relative_error
from regrow.training.features import LayerMapping, ModelFeatures

NEEDS = frozenset({"outputs"})


def loss(
    student: ModelFeatures, teacher: ModelFeatures, mapping: LayerMapping, mask_BT: Tensor
) -> Tensor:
    """Σ_tokens mean_layers |s − t|² / |t|²."""
    pairs = mapping.states(student, teacher, mask_BT)
    return torch.stack([relative_error(s_NH, t_NH) for s_NH, t_NH in pairs]).mean()
