"""Compares next-token distributions of inner layers (the logit lens; nostalgebraist, 2020)."""

from __future__ import annotations

from torch import Tensor

from regrow.training.feature_losses._measures import through_heads
from regrow.training.features import LayerMapping, ModelFeatures

NEEDS = frozenset({"lens"})


def loss(
    student: ModelFeatures, teacher: ModelFeatures, mapping: LayerMapping, mask_BT: Tensor
) -> Tensor:
    """Σ_tokens mean_depths KL(P ‖ Q) in nats.

    P and Q are softmax(head(norm(layer output))) of the teacher and the student.
    """
    return through_heads(student, teacher, mapping, mask_BT, "forward_kl")
