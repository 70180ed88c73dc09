"""Export: a checkpoint as a GGUF file for llama.cpp and Ollama, proven by llama.cpp itself."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regrow.stages.export.config import ExportConfig

if TYPE_CHECKING:
    from regrow.stages.export.stage import export

__all__ = ["ExportConfig", "export"]


def __getattr__(name: str) -> Any:
    if name != "export":
        raise AttributeError(name)
    return import_module("regrow.stages.export.stage").export
