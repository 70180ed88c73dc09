"""What each model would say at chosen depths (the logit lens; nostalgebraist, 2020)."""

from __future__ import annotations

from torch import Tensor

from regrow.training.feature_losses._measures import through_heads
from regrow.training.layer_mapping import LayerMapping, ModelFeatures

NEEDS = frozenset({"lens"})


def loss(
    student: ModelFeatures, teacher: ModelFeatures, match: LayerMapping, mask_BT: Tensor
) -> Tensor:
    """Σ_tokens mean_depths KL(P ‖ Q) in nats, P and Q = softmax(head(norm(block output)))."""
    return through_heads(student, teacher, match, mask_BT, "forward_kl")
