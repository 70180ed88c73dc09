"""The logit lens with a divergence that is symmetric in student and teacher
(DistillLens; Dhakal et al., 2026, arXiv:2602.13567)."""

from __future__ import annotations

from torch import Tensor

from regrow.training.feature_losses._measures import through_heads
from regrow.training.features import LayerMapping, ModelFeatures

NEEDS = frozenset({"lens"})


def loss(
    student: ModelFeatures, teacher: ModelFeatures, mapping: LayerMapping, mask_BT: Tensor
) -> Tensor:
    """Σ_tokens mean_depths of the Jensen-Shannon divergence ½ KL(P ‖ M) + ½ KL(Q ‖ M), in nats.

    M = (P + Q) / 2; P and Q as in logit_lens.
    """
    return through_heads(student, teacher, mapping, mask_BT, "jsd")
