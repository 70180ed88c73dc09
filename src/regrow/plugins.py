"""Plug-ins: each Python file in a folder is a plug-in, named by its file name."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from regrow.errors import unknown


def names(package: str) -> list[str]:
    """Sorted names of the plug-ins in a dotted `package`, without files that begin with `_`."""
    module = importlib.import_module(package)
    files = (entry.name for entry in pkgutil.iter_modules(module.__path__))
    return sorted(name for name in files if not name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """Import the plug-in `name` of `package`.

    Raises UserError, with a list of all plug-ins, when there is no such file.
    """
    known = names(package)
    if name not in known:
        raise unknown(package.rpartition(".")[2], name, known)
    return importlib.import_module(f"{package}.{name}")
