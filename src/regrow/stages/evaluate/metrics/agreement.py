"""Top-1 agreement: how often the model's most likely token is the teacher's."""

from __future__ import annotations

from torch import Tensor

READS_TEACHER = True
UNIT = ""
CONVENTION = "share of scored tokens at which the model's most likely token is that of {teacher}"


def per_token(logits_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> Tensor:
    """1 where both have the same most likely token, else 0."""
    return logits_NV.argmax(-1) == teacher_NV.argmax(-1)
