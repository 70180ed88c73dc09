"""The input embedding's outputs drawn to the teacher's (TinyBERT; Jiao et al., 2020,
arXiv:1909.10351)."""

from __future__ import annotations

from torch import Tensor

from regrow.training.feature_losses._measures import relative_error
from regrow.training.layer_mapping import LayerMapping, ModelFeatures

NEEDS = frozenset({"embeddings"})


def loss(
    student: ModelFeatures, teacher: ModelFeatures, match: LayerMapping, mask_BT: Tensor
) -> Tensor:
    """Σ_tokens |s − t|² / |t|², each token's embedding as the first block gets it."""
    return relative_error(*match.embedded(student, teacher, mask_BT))
