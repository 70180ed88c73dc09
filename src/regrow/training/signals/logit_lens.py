"""What each model would say at chosen depths (the logit lens; nostalgebraist, 2020)."""

from __future__ import annotations

from torch import Tensor

from regrow.training.inside import Inside
from regrow.training.match import Match
from regrow.training.signals._measures import through_heads

NEEDS = frozenset({"lens"})


def loss(student: Inside, teacher: Inside, match: Match, mask_BT: Tensor) -> Tensor:
    """Σ_tokens mean_depths KL(P ‖ Q) in nats, P and Q = softmax(head(norm(block output)))."""
    return through_heads(student, teacher, match, mask_BT, "forward_kl")
