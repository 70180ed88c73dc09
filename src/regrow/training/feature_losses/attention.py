"""Compares attention weights with the teacher's (MiniLM; Wang et al., 2020, arXiv:2002.10957)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.features import LayerMapping, ModelFeatures

NEEDS = frozenset({"attentions"})


def loss(
    student: ModelFeatures, teacher: ModelFeatures, mapping: LayerMapping, mask_BT: Tensor
) -> Tensor:
    """Σ_tokens mean_layers mean_heads KL(teacher's row ‖ student's row), in nats."""
    pairs = mapping.attended(student, teacher, mask_BT)
    return torch.stack([_divergence(q_NAT, p_NAT) for q_NAT, p_NAT in pairs]).mean()


def _divergence(q_NAT: Tensor, p_NAT: Tensor) -> Tensor:
    """Σ p log(p / q) − p + q: the KL of rows that sum to 1, and ≥ 0 for rows rounded to bfloat16.

    Keys that the student does not see are left out: later tokens, other documents, and tokens
    beyond its sliding window.
    """
    seen = q_NAT > 0
    q_NAT, p_NAT = q_NAT.where(seen, 1.0), p_NAT.where(seen, 1.0)
    log_p_NAT = p_NAT.where(p_NAT > 0, 1.0).log()  # 0 log 0 = 0
    return (p_NAT * (log_p_NAT - q_NAT.log()) - p_NAT + q_NAT).sum() / q_NAT.shape[1]
