"""Generate: let a model answer prompts, for a student to be taught by the answers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regrow.stages.generate.config import GenerateConfig

if TYPE_CHECKING:
    from regrow.stages.generate.stage import generate

__all__ = ["GenerateConfig", "generate"]


def __getattr__(name: str) -> Any:
    if name != "generate":
        raise AttributeError(name)
    return import_module("regrow.stages.generate.stage").generate
