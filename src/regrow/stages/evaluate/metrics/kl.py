"""KL divergence from the teacher over the whole vocabulary, on every text."""

from __future__ import annotations

from torch import Tensor

READS_TEACHER = True
UNIT = "nats"
CONVENTION = "KL({teacher} || model) per scored token over all token ids that both have"


def per_token(logits_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Σ_v p_v (log p_v − log q_v) in nats; p is the teacher's softmax, q the model's."""
    log_p_NV, log_q_NV = teacher_NV.log_softmax(-1), logits_NV.log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
