"""Distill: train a student to give the teacher's next-token distribution."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regrow.stages.distill.config import DistillConfig

if TYPE_CHECKING:
    from regrow.stages.distill.stage import distill

__all__ = ["DistillConfig", "distill"]


def __getattr__(name: str) -> Any:
    if name != "distill":
        raise AttributeError(name)
    return import_module("regrow.stages.distill.stage").distill
