"""A file's name is its public name: find the plug-ins of a folder and load one."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from regrow.errors import unknown


def names(package: str) -> list[str]:
    """Public names in `package` (dotted), sorted; files that begin with `_` are not plug-ins."""
    module = importlib.import_module(package)
    found = (entry.name for entry in pkgutil.iter_modules(module.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """Import the plug-in `name` of `package`.

    Raises UserError when there is no such file, naming those there are.
    """
    known = names(package)
    if name not in known:
        raise unknown(package.rpartition(".")[2], name, known)
    return importlib.import_module(f"{package}.{name}")
