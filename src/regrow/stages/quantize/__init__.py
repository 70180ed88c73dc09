"""Quantize: a model's weights in 8 or 4 bits, as compressed-tensors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regrow.stages.quantize.config import QuantizeConfig

if TYPE_CHECKING:
    from regrow.stages.quantize.stage import quantize

__all__ = ["QuantizeConfig", "quantize"]


def __getattr__(name: str) -> Any:
    if name != "quantize":
        raise AttributeError(name)
    return import_module("regrow.stages.quantize.stage").quantize
