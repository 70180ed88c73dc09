"""Cache: run the teacher once over the text, and store what it says for distillations to come."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regrow.stages.cache.config import CacheConfig

if TYPE_CHECKING:
    from regrow.stages.cache.stage import cache

__all__ = ["CacheConfig", "cache"]


def __getattr__(name: str) -> Any:
    if name != "cache":
        raise AttributeError(name)
    return import_module("regrow.stages.cache.stage").cache
