"""Compares outputs of the input embedding with the teacher's (TinyBERT; Jiao et al., 2020,
arXiv:1909.10351)."""

from __future__ import annotations

from torch import Tensor

from regrow.training.feature_losses._measures import relative_error
from regrow.training.features import LayerMapping, ModelFeatures

NEEDS = frozenset({"embeddings"})


def loss(
    student: ModelFeatures, teacher: ModelFeatures, mapping: LayerMapping, mask_BT: Tensor
) -> Tensor:
    """Σ_tokens |s − t|² / |t|², where s and t are the inputs of the first layer."""
    return relative_error(*mapping.embedded(student, teacher, mask_BT))
