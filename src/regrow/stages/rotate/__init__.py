"""Rotate: turn the residual stream, so that its channels are what matters most, in order."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regrow.stages.rotate.config import RotateConfig

if TYPE_CHECKING:
    from regrow.stages.rotate.stage import rotate

__all__ = ["RotateConfig", "rotate"]


def __getattr__(name: str) -> Any:
    if name != "rotate":
        raise AttributeError(name)
    return import_module("regrow.stages.rotate.stage").rotate
