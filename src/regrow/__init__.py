"""regrow: make a smaller language model out of a large one, and prove it is good."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint, load, save
    from regrow.comparison import compare
    from regrow.data import DataConfig, SourceConfig
    from regrow.errors import UserError
    from regrow.options import Options
    from regrow.plan import Plan
    from regrow.recipe import Recipe, run
    from regrow.search import prune
    from regrow.stages.cache import CacheConfig, cache
    from regrow.stages.distill import DistillConfig, distill
    from regrow.stages.evaluate import EvaluateConfig, evaluate
    from regrow.stages.export import ExportConfig, export
    from regrow.stages.generate import GenerateConfig, generate
    from regrow.stages.profile import ProfileConfig, profile
    from regrow.stages.prune import PruneConfig
    from regrow.stages.quantize import QuantizeConfig, quantize
    from regrow.stages.report import ReportConfig, report
    from regrow.stages.rotate import RotateConfig, rotate

_HOME = {
    "Checkpoint": "checkpoint",
    "load": "checkpoint",
    "save": "checkpoint",
    "compare": "comparison",
    "DataConfig": "data",
    "SourceConfig": "data",
    "CacheConfig": "stages.cache",
    "cache": "stages.cache",
    "DistillConfig": "stages.distill",
    "distill": "stages.distill",
    "EvaluateConfig": "stages.evaluate",
    "evaluate": "stages.evaluate",
    "ExportConfig": "stages.export",
    "export": "stages.export",
    "GenerateConfig": "stages.generate",
    "generate": "stages.generate",
    "Options": "options",
    "Plan": "plan",
    "ProfileConfig": "stages.profile",
    "profile": "stages.profile",
    "PruneConfig": "stages.prune",
    "prune": "search",
    "QuantizeConfig": "stages.quantize",
    "quantize": "stages.quantize",
    "Recipe": "recipe",
    "ReportConfig": "stages.report",
    "report": "stages.report",
    "RotateConfig": "stages.rotate",
    "rotate": "stages.rotate",
    "run": "recipe",
    "UserError": "errors",
}

__all__ = [
    "CacheConfig",
    "Checkpoint",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "Options",
    "Plan",
    "ProfileConfig",
    "PruneConfig",
    "QuantizeConfig",
    "Recipe",
    "ReportConfig",
    "RotateConfig",
    "SourceConfig",
    "UserError",
    "__version__",
    "cache",
    "compare",
    "distill",
    "evaluate",
    "export",
    "generate",
    "load",
    "profile",
    "prune",
    "quantize",
    "report",
    "rotate",
    "run",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'regrow' has no attribute {name!r}")
    return getattr(import_module(f"regrow.{_HOME[name]}"), name)
