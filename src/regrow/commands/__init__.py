"""The commands, one function each: its parameters are the flags, its docstring is the help."""

from __future__ import annotations

from regrow.commands.cutting import compare, profile, prune, rotate
from regrow.commands.delivery import evaluate, export, quantize
from regrow.commands.jobs import inspect, report, run, watch
from regrow.commands.teaching import cache, distill, generate

__all__ = [
    "cache",
    "compare",
    "distill",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "profile",
    "prune",
    "quantize",
    "report",
    "rotate",
    "run",
    "watch",
]
