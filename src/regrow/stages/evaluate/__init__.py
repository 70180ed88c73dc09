"""Evaluate: models side by side: size, quality on text, distance to the teacher, speed, samples."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regrow.stages.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    from regrow.stages.evaluate.stage import evaluate

__all__ = ["EvaluateConfig", "evaluate"]


def __getattr__(name: str) -> Any:
    if name != "evaluate":
        raise AttributeError(name)
    return import_module("regrow.stages.evaluate.stage").evaluate
