"""The target of a search: a share of the parameters, and limits on bytes, memory and time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regrow import cost, families
from regrow.cost.units import size_text
from regrow.errors import UserError
from regrow.families import Family
from regrow.pruning.config import PruneConfig, bytes_of
from regrow.quantization import formats

TOLERANCE = 0.01  # allowed difference from the requested share of parameters
SLACK = 0.03  # a shape this far below every limit could keep more

Sizes = dict[str, int]


@dataclass(frozen=True)
class Limit:
    """An upper limit on a quantity that is computed from a shape's sizes."""

    key: str
    """The name of the config field, for instance max_bytes."""
    most: float
    value: Callable[[Sizes], float]
    """Computes the quantity for a shape, in the unit of `most`."""
    basis: str
    """The weight format and the length that it is computed for, for messages."""

    def show(self, value: float, up: bool = False) -> str:
        """The value with its unit; with `up`, a limit of that text is met by the value."""
        if not self.key.endswith("_ms"):
            return size_text(value, up)
        return f"{math.ceil(10 * value) / 10 if up else value:.1f} ms"


@dataclass(frozen=True)
class Target:
    """A share of the parameters, met within TOLERANCE, and limits that must all be met."""

    keep_params: float | None = None
    limits: tuple[Limit, ...] = ()

    def __str__(self) -> str:
        share = () if self.keep_params is None else (f"keep_params {self.keep_params}",)
        return ", ".join((*share, *(f"{x.key} {x.show(x.most)}" for x in self.limits)))

    def within(self, sizes: Sizes) -> bool:
        """Whether a shape meets every limit."""
        return all(limit.value(sizes) <= limit.most for limit in self.limits)

    def near(self, sizes: Sizes) -> bool:
        """Whether a shape is so close to a limit that a larger shape would probably exceed it."""
        return any(limit.value(sizes) >= (1 - SLACK) * limit.most for limit in self.limits)


def target_of(family: Family, config: dict[str, Any], prune: PruneConfig) -> Target:
    """The target of a prune config without its latencies, which must be measured.

    Raises UserError for an unknown format.
    """
    name, length = prune.format, prune.context_length
    formats.find(name)
    limits = []
    if prune.max_bytes is not None:
        limits.append(
            Limit(
                "max_bytes",
                bytes_of(prune.max_bytes),
                lambda sizes: cost.file_bytes(family, config, name, sizes),
                f"in {name}",
            )
        )
    if prune.max_ram is not None:
        limits.append(
            Limit(
                "max_ram",
                bytes_of(prune.max_ram),
                lambda sizes: cost.ram_bytes(family, config, name, length, sizes),
                f"in {name} at {length} tokens",
            )
        )
    return Target(prune.keep_params, tuple(limits))


def refuse(
    family: Family,
    config: dict[str, Any],
    target: Target,
    multiple_of: int,
    works: int | None = None,
) -> UserError:
    """The error for a target that no shape meets, with the reason and the nearest value.

    `works` is a smaller step of the widths that meets it.
    """
    full = family.sizes(config)
    if target.keep_params is None and target.within({}):
        now = ", ".join(f"{x.show(x.value({}))} {x.basis}" for x in target.limits)
        return UserError(f"{target}: the whole model takes {now}: nothing to cut; give less")
    least = smallest(family, config, multiple_of)
    shape = ", ".join(f"{family.config_keys[dim]} {size}" for dim, size in least.items())
    for limit in target.limits:
        if limit.value(least) > limit.most:
            return UserError(
                f"{limit.key} {limit.show(limit.most)}: the smallest shape this model can be cut "
                f"to takes {limit.show(limit.value(least), up=True)} {limit.basis} ({shape}); "
                "give at least that"
            )
    share = family.count(config, least) / family.count(config, full)
    if target.keep_params is not None and target.keep_params < share:
        shape = f"; the smallest shape it can be cut to keeps {share:.3f} ({shape})"
    else:
        shape = ""
    far = "comes near it"
    if target.keep_params is not None:
        far = f"keeps that share within {TOLERANCE}"
    advice = "change it" if works is None else f"give multiple_of {works}, or change it"
    return UserError(
        f"{target}: no shape with widths that are multiples of {multiple_of} {far}; {advice}{shape}"
    )


def smallest(family: Family, config: dict[str, Any], multiple_of: int) -> Sizes:
    """The smallest legal size of every dimension that can be cut."""
    full = family.sizes(config)
    least = {"layers": 1, "kv_heads": 1, "heads": 1}
    least["heads"] = family.step("heads", config, multiple_of, **least)
    if "experts" in full:
        least["experts"] = int(family.value(config, "num_experts_per_tok"))
    sizes: Sizes = {}
    dims = ("layers", "mlp", "experts", "expert_mlp", "kv_heads", "heads", "hidden")
    for dim in (dim for dim in dims if dim in full and dim not in family.refused):
        wanted = least.get(dim) or family.step(dim, config, multiple_of, **{**full, **sizes})
        tried = {**sizes, dim: min(wanted, full[dim])}
        if dim == "kv_heads":  # their query heads are cut with them
            tried["heads"] = full["heads"] // full["kv_heads"]
        tried = {dim: size for dim, size in tried.items() if size != full[dim]}
        if families.can_have(family, config, tried, multiple_of):
            sizes = tried
    return sizes
