"""Linear modules of a checkpoint, by name, and the patterns that choose among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from regrow.errors import UserError

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint
    from regrow.families import Family

WEIGHT = ".weight"


def linear_modules(checkpoint: Checkpoint) -> list[str]:
    """Modules with a two-dimensional weight, embedding included, in the checkpoint's order."""
    return [n.removesuffix(WEIGHT) for n, s in checkpoint.shapes.items() if len(s) == 2]


def is_router(family: Family, name: str) -> bool:
    """Whether a tensor is a router, which is small and sensitive to small changes."""
    place = family.find(name)
    return place is not None and family.tensors[place.template].axes[0] == "experts"


def check_patterns(given: Mapping[str, Iterable[str]], modules: list[str]) -> None:
    """Raise UserError for a pattern that matches none of the `modules`; `given` is by field."""
    for field, patterns in given.items():
        for pattern in patterns:
            if not any(re.search(pattern, module) for module in modules):
                names = sorted({module.rpartition(".")[2] for module in modules})
                raise UserError(
                    f"{field}: {pattern!r} matches no module of this model; there are, for "
                    f"instance, {modules[1]}, and by their last name {', '.join(names)}"
                )


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that is found in a module's name."""
    return next((pattern for pattern in patterns if re.search(pattern, module)), None)
