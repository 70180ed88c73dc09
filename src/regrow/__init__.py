"""regrow: make a smaller language model out of a large one, and prove it is good.

The public names stand in `__init__.pyi`, each with the module it comes from. A module is imported
when the first of its names is used. Every stage is public too, as the function of its name.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _homes() -> dict[str, str]:
    """The module of each public name, read from the stub."""
    tree = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_HOMES = _homes()
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    from regrow.plugins import names

    if name in names("regrow.stages"):
        from regrow.stage import find

        return find(name).function
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'regrow' has no attribute {name!r}")
