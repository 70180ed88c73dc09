"""Profile: one forward pass over calibration text that measures what matters in a checkpoint."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regrow.stages.profile.config import ProfileConfig

if TYPE_CHECKING:
    from regrow.stages.profile.stage import profile

__all__ = ["ProfileConfig", "profile"]


def __getattr__(name: str) -> Any:
    if name != "profile":
        raise AttributeError(name)
    return import_module("regrow.stages.profile.stage").profile
