"""Repair: new weights for the layers that read what was cut, without training; one file a method.

A method's file has

    GRAMS: bool     whether it works on the profile's Gram matrices
    repair(job: Job, ridges: tuple[float, ...] = RIDGES) -> Repaired
    work_bytes(sizes: dict[str, int], tokens: int) -> int       what it puts on disk meanwhile

What it gives back puts the new weights in place of cut ones, by the parent's names of tensors, and
says in `solutions` what it did: per tensor (λ or None, error before, error after).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.families import Family
from regrow.plan import Plan
from regrow.profile_folder import Profile

Solutions = dict[str, tuple[float | None, float, float]]


@dataclass(frozen=True)
class RepairSetup:
    """What a method is given; `work` is a folder for what it must put on disk meanwhile."""

    checkpoint: Checkpoint
    family: Family
    profile: Profile
    plan: Plan
    work: Path
    options: Options
    tokens: int = 0
    """Calibration tokens that a method which runs text may use, at most."""
    upstream: float = 1.0
    """Share of the error of earlier layers that a layer is to make up for."""


class Repaired(Protocol):
    """New weights by the parent's tensor names, and what was done to get them."""

    solutions: Solutions

    def __call__(self, name: str, kept: Tensor) -> Tensor:
        """The tensor to write for the parent's tensor `name`, whose cut form is `kept`."""
        ...
