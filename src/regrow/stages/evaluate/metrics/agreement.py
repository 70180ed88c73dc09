"""Top-1 agreement: share of tokens with the same most likely token in model and teacher."""

from __future__ import annotations

from torch import Tensor

READS_TEACHER = True
UNIT = ""
CONVENTION = "share of scored tokens at which the model's most likely token is that of {teacher}"


def per_token(logits_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return 1 where model and teacher have the same most likely token, else 0."""
    return logits_NV.argmax(-1) == teacher_NV.argmax(-1)
