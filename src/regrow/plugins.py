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


def check_weights(package: str, kind: str, weights: dict[str, float]) -> dict[str, float]:
    """Return `weights`, by the names of plug-ins in `package`; a `kind` is "loss", for example.

    Raises ValueError if there is none, and for an unknown name or a weight that is not above 0.
    """
    known = names(package)
    if not weights:
        raise ValueError(f"name one at least, with its weight; there are: {', '.join(known)}")
    for name, weight in weights.items():
        if name not in known:
            raise unknown(kind, name, known)
        if weight <= 0:
            raise ValueError(f"the weight of {name} must be above 0; leave the {kind} out instead")
    return weights


def load(package: str, name: str) -> ModuleType:
    """Import the plug-in `name` of `package`.

    Raises UserError, with a list of all plug-ins, when there is no such file.
    """
    known = names(package)
    if name not in known:
        raise unknown(package.rpartition(".")[2], name, known)
    return importlib.import_module(f"{package}.{name}")
