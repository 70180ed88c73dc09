"""Attention patterns drawn to the teacher's (MiniLM; Wang et al., 2020, arXiv:2002.10957)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.layer_mapping import LayerMapping, ModelFeatures

NEEDS = frozenset({"attentions"})


def loss(
    student: ModelFeatures, teacher: ModelFeatures, match: LayerMapping, mask_BT: Tensor
) -> Tensor:
    """Σ_tokens mean_layers mean_heads KL(teacher's row ‖ student's row), in nats."""
    pairs = match.attended(student, teacher, mask_BT)
    return torch.stack([_divergence(q_NAT, p_NAT) for q_NAT, p_NAT in pairs]).mean()


def _divergence(q_NAT: Tensor, p_NAT: Tensor) -> Tensor:
    """Σ p log(p / q) − p + q: the KL of rows that sum to 1, and ≥ 0 for those rounded to bf16.

    Left out are keys that the student does not see: later ones, other documents', those beyond its
    window.
    """
    seen = q_NAT > 0
    q_NAT, p_NAT = q_NAT.where(seen, 1.0), p_NAT.where(seen, 1.0)
    log_p_NAT = p_NAT.where(p_NAT > 0, 1.0).log()  # 0 log 0 = 0
    return (p_NAT * (log_p_NAT - q_NAT.log()) - p_NAT + q_NAT).sum() / q_NAT.shape[1]
