"""Block outputs drawn to the teacher's (FitNets; Romero et al., 2015, arXiv:1412.6550)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.inside import Inside
from regrow.training.match import Match
from regrow.training.signals._measures import relative_error

NEEDS = frozenset({"outputs"})


def loss(student: Inside, teacher: Inside, match: Match, mask_BT: Tensor) -> Tensor:
    """Σ_tokens mean_blocks |s − t|² / |t|²."""
    pairs = match.states(student, teacher, mask_BT)
    return torch.stack([relative_error(s_NH, t_NH) for s_NH, t_NH in pairs]).mean()
