"""Prune: choose what is kept, cut the rest away, re-solve what read it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regrow.stages.prune.config import PruneConfig

if TYPE_CHECKING:
    from regrow.stages.prune.stage import prune

__all__ = ["PruneConfig", "prune"]


def __getattr__(name: str) -> Any:
    if name != "prune":
        raise AttributeError(name)
    return import_module("regrow.stages.prune.stage").prune
