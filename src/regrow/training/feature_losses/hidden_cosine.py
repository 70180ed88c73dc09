"""Compares directions of layer outputs with the teacher's (DistilBERT; Sanh et al., 2019,
arXiv:1910.01108)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from regrow.training.features import LayerMapping, ModelFeatures

NEEDS = frozenset({"outputs"})


def loss(
    student: ModelFeatures, teacher: ModelFeatures, mapping: LayerMapping, mask_BT: Tensor
) -> Tensor:
    """Σ_tokens mean_layers (1 − cos(s, t)), between 0 and 2."""
    pairs = mapping.states(student, teacher, mask_BT)
    return torch.stack([_angle(s_NH, t_NH) for s_NH, t_NH in pairs]).mean()


def _angle(s_NH: Tensor, t_NH: Tensor) -> Tensor:
    """1 − cos, computed as ½ |s/|s| − t/|t||², which is accurate near 0."""
    s_NH, t_NH = functional.normalize(s_NH, dim=-1), functional.normalize(t_NH, dim=-1)
    return (s_NH - t_NH).square().sum() / 2
