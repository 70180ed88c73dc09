"""Candidate shapes of a given size: where the parameters could be taken from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from random import Random
from typing import Any

from regrow.errors import UserError
from regrow.families import Family

TOLERANCE = 0.01  # a candidate keeps the asked share of parameters within this


@dataclass(frozen=True)
class Shape:
    """A named set of sizes (only those that change) and the parameters it leaves."""

    name: str
    sizes: dict[str, int]
    parameters: int


def candidates(
    family: Family, config: dict[str, Any], keep_params: float, multiple_of: int
) -> list[Shape]:
    """Shapes that keep `keep_params` ± 0.01 of the parameters: MLP, depth, hidden, and mixes.

    Each fixes one cut (as many layers as the target allows, as much of hidden, a few layers, one
    KV head) and meets the target with the MLP: of a mixture of experts with their number, or where
    that is too coarse with their width. Raises UserError when no shape meets the target.
    """
    full = family.sizes(config)
    target = keep_params * family.count(config)
    free = free_dims(family)
    fixed: list[tuple[str, dict[str, int], tuple[str, ...]]] = [(dim, {}, (dim,)) for dim in free]
    if "experts" in free:
        half = (target + family.count(config)) / 2
        some = _least(family, config, half, multiple_of, "experts")
        fixed.insert(1, ("experts + expert_mlp", some, ("expert_mlp",)))
    fixed += [
        ("depth-heavy", _least(family, config, target, multiple_of, "layers"), free),
        ("hidden-heavy", _least(family, config, target, multiple_of, "hidden"), free),
        (f"{free[0]} + kv_heads", {"kv_heads": full["kv_heads"] - 1}, free),
    ]
    for share in (30, 15, 10):
        cut = max(1, round(full["layers"] / share))
        fixed.append((f"{free[0]} + {cut} layers", {"layers": full["layers"] - cut}, free))
    found: dict[tuple[tuple[str, int], ...], Shape] = {}
    for name, sizes, dims in fixed:
        tried = (_meet(family, config, target, multiple_of, name, sizes, dim) for dim in dims)
        for shape in tried:
            if shape is not None and abs(shape.parameters / target - 1) * keep_params <= TOLERANCE:
                found.setdefault(tuple(sorted(shape.sizes.items())), shape)
                break
    if not found:
        raise UserError(
            f"keep_params {keep_params}: no shape with widths that are multiples of {multiple_of} "
            f"keeps that share within {TOLERANCE}; change it or lower multiple_of"
        )
    return list(found.values())


def free_dims(family: Family) -> tuple[str, ...]:
    """Dimensions that meet a target where others are fixed: the MLP, or experts and their width."""
    return ("experts", "expert_mlp") if "experts" in family.config_keys else ("mlp",)


def grid(
    family: Family, config: dict[str, Any], keep_params: float, multiple_of: int, count: int
) -> list[Shape]:
    """Up to `count` shapes: the `candidates`, and of all combinations of cuts an even sample.

    Layers go down to 60 %, KV heads and query heads per KV head to a half, hidden to 80 %; the MLP,
    or experts or their width, meets the target. Raises UserError when no shape does.
    """
    full = family.sizes(config)
    target = keep_params * family.count(config)
    first = candidates(family, config, keep_params, multiple_of)
    known = {tuple(sorted(shape.sizes.items())) for shape in first}
    group = full["heads"] // full["kv_heads"]
    found = []
    for layers, kv_heads, heads, hidden, free in product(
        range(full["layers"], math.ceil(0.6 * full["layers"]) - 1, -1),
        range(full["kv_heads"], math.ceil(full["kv_heads"] / 2) - 1, -1),
        range(group, math.ceil(group / 2) - 1, -1),
        (1.0, 0.95, 0.9, 0.85, 0.8),
        free_dims(family),
    ):
        sizes = {"layers": layers, "kv_heads": kv_heads, "heads": heads * kv_heads}
        step = family.step("hidden", config, multiple_of, **sizes)
        sizes["hidden"] = max(step, round(hidden * full["hidden"] / step) * step)
        sizes = {dim: size for dim, size in sizes.items() if size != full[dim]}
        shape = _meet(family, config, target, multiple_of, "", sizes, free)
        if shape is None or abs(shape.parameters / target - 1) * keep_params > TOLERANCE:
            continue
        key = tuple(sorted(shape.sizes.items()))
        if key not in known:
            known.add(key)
            name = ", ".join(f"{dim} {size}" for dim, size in shape.sizes.items())
            found.append(replace(shape, name=name))
    room = max(0, count - len(first))
    return first + (found if len(found) <= room else Random(0).sample(found, room))


def _meet(
    family: Family,
    config: dict[str, Any],
    target: float,
    multiple_of: int,
    name: str,
    sizes: dict[str, int],
    free: str,
) -> Shape | None:
    """The fixed `sizes` with `free` set so that the parameters come nearest to the target."""
    full = family.sizes(config)
    if sizes.get("kv_heads") == 0:
        return None
    if "kv_heads" in sizes and "heads" not in sizes:
        sizes = {**sizes, "heads": full["heads"] // full["kv_heads"] * sizes["kv_heads"]}
    step = family.step(free, config, multiple_of, **sizes)
    # Parameters grow evenly with the free width, so that two counts tell where to look.
    least, most = (family.count(config, {**sizes, free: width}) for width in (0, full[free]))
    wanted = int((target - least) / (most - least) * full[free]) // step * step
    widths = [n for n in (wanted, wanted + step) if 0 < n < full[free]] or [step]
    best = min(
        {*(min(width, full[free]) for width in widths), full[free]},
        key=lambda width: abs(family.count(config, {**sizes, free: width}) - target),
    )
    chosen = {dim: size for dim, size in {**sizes, free: best}.items() if size != full[dim]}
    if not chosen:  # the whole model meets the target, and there is nothing to cut
        return None
    try:
        family.check_sizes(config, chosen, multiple_of)
    except UserError:
        return None
    return Shape(name, chosen, family.count(config, chosen))


def _least(
    family: Family, config: dict[str, Any], target: float, multiple_of: int, dim: str
) -> dict[str, int]:
    """The smallest size of `dim` that alone stays above the target; the MLP takes the rest."""
    full = family.sizes(config)
    step = family.step(dim, config, multiple_of)
    sizes = range(step, full[dim] + 1, step)
    enough = [size for size in sizes if family.count(config, {dim: size}) >= target]
    return {dim: enough[0]} if enough else {}
