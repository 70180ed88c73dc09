"""Report: a run folder in, one self-contained HTML page out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regrow.stages.report.config import ReportConfig

if TYPE_CHECKING:
    from regrow.stages.report.stage import report

__all__ = ["ReportConfig", "report"]


def __getattr__(name: str) -> Any:
    if name != "report":
        raise AttributeError(name)
    return import_module("regrow.stages.report.stage").report
