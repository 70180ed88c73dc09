"""Candidate shapes that meet a target."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from random import Random
from typing import Any

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.families import Family
from regrow.pruning.config import TARGETS, PruneConfig
from regrow.pruning.prune import check_target
from regrow.search.targets import TOLERANCE, Sizes, Target, refuse, smallest, target_of

HANDFUL = 8
"""Up to this many shapes come from a fixed list and are tried in one round; more, from a grid."""
GRID_HIDDEN = (1.0, 0.95, 0.9, 0.85, 0.8)
SCALES = tuple(n / 20 for n in range(19, 0, -1))


FINER = (64, 32, 16, 8, 4, 2, 1)
"""Steps of the widths that an error suggests, if they meet the target."""
Fixed = tuple[str, Sizes, tuple[str, ...]]
"""A shape's name, its fixed sizes, and the free dimensions to try in turn to meet the target."""


@dataclass(frozen=True)
class Shape:
    """A name, the sizes that change, and the number of parameters that remain."""

    name: str
    sizes: Sizes
    parameters: int
    format: str | None = None
    """The format in which it meets the target, if a search chooses among several."""


def candidates(
    family: Family, config: dict[str, Any], target: float | Target, multiple_of: int
) -> list[Shape]:
    """Shapes that meet `target` (a number means keep_params) by cuts of MLP, depth and hidden.

    Each shape fixes one cut (as many layers as the target allows, as much of hidden, a few layers,
    or one KV head) and sets a free width to meet the target: that of the MLP, or in a mixture of
    experts the number of experts or, if that is too coarse, their width. keep_params is met within
    ± 0.01; under limits, the widest size that meets them is used. Raises UserError when no shape
    meets the target.
    """
    aim = target if isinstance(target, Target) else Target(keep_params=target)
    shapes = _candidates(family, config, aim, multiple_of)
    if not shapes:
        finer = (step for step in FINER if step < multiple_of)
        works = next((step for step in finer if _candidates(family, config, aim, step)), None)
        raise refuse(family, config, aim, multiple_of, works)
    return shapes


def _candidates(
    family: Family, config: dict[str, Any], aim: Target, multiple_of: int
) -> list[Shape]:
    """The shapes of `candidates`; none if no shape meets the target."""
    full, model = family.sizes(config), (family, config, multiple_of)
    free = free_dims(family)
    fixed: list[Fixed] = [(dim, {}, (dim,)) for dim in free]
    if "experts" in free and aim.keep_params is not None:
        half = Target(keep_params=(aim.keep_params + 1) / 2)
        some = _least(family, config, half, multiple_of, "experts")
        fixed.insert(1, ("experts + expert_mlp", some, ("expert_mlp",)))
    fixed += [
        ("depth-heavy", _least(family, config, aim, multiple_of, "layers"), free),
        ("hidden-heavy", _least(family, config, aim, multiple_of, "hidden"), free),
        (f"{free[0]} + kv_heads", {"kv_heads": full["kv_heads"] - 1}, free),
    ]
    for share in (30, 15, 10):
        cut = max(1, round(full["layers"] / share))
        fixed.append((f"{free[0]} + {cut} layers", {"layers": full["layers"] - cut}, free))
    shapes = _meeting(family, config, aim, multiple_of, fixed)
    if not shapes and aim.keep_params is None and not aim.within({}):
        alike = _alike(*model)
        tried = (_meet(family, config, aim, multiple_of, *cut, free[-1]) for cut in alike)
        shapes = [shape for shape in tried if shape is not None][:1]
    return shapes


def free_dims(family: Family) -> tuple[str, ...]:
    """The dimensions that are set to meet a target: the MLP, or experts and their width.

    A model in which none of these can be cut meets it with fewer layers.
    """
    of_experts = "experts" in family.config_keys
    for dims in (("experts", "expert_mlp") if of_experts else (), ("mlp",)):
        usable = tuple(d for d in dims if d in family.config_keys and d not in family.refused)
        if usable:
            return usable
    return ("layers",)


def grid(
    family: Family, config: dict[str, Any], target: float | Target, multiple_of: int, count: int
) -> list[Shape]:
    """Up to `count` shapes: the `candidates`, and an even sample of all combinations of cuts.

    At least 60 % of the layers, half of the KV heads and of the query heads per KV head, and 80 %
    of hidden are kept; the MLP, or experts or their width, is then set to meet the target. Raises
    UserError when no shape meets it.
    """
    aim = target if isinstance(target, Target) else Target(keep_params=target)
    full = family.sizes(config)
    first = candidates(family, config, aim, multiple_of)
    known = {key_of(shape.sizes) for shape in first}
    group = full["heads"] // full["kv_heads"]
    cuts: dict[tuple[tuple[str, int], ...], Sizes] = {}
    for layers, kv_heads, heads, hidden in product(
        range(full["layers"], math.ceil(0.6 * full["layers"]) - 1, -1),
        range(full["kv_heads"], math.ceil(full["kv_heads"] / 2) - 1, -1),
        range(group, math.ceil(group / 2) - 1, -1),
        GRID_HIDDEN,
    ):
        sizes = {"layers": layers, "kv_heads": kv_heads, "heads": heads * kv_heads}
        step = family.step("hidden", config, multiple_of, **sizes)
        sizes["hidden"] = max(step, round(hidden * full["hidden"] / step) * step)
        sizes = {dim: size for dim, size in sizes.items() if size != full[dim]}
        cuts[key_of(sizes)] = sizes
    fixed: list[Fixed] = [("", cut, (dim,)) for cut in cuts.values() for dim in free_dims(family)]
    others = [
        replace(shape, name=", ".join(f"{dim} {size}" for dim, size in shape.sizes.items()))
        for shape in _meeting(family, config, aim, multiple_of, fixed)
        if key_of(shape.sizes) not in known
    ]
    room = max(0, count - len(first))
    return first + (others if len(others) <= room else Random(0).sample(others, room))


def refit(
    family: Family, config: dict[str, Any], target: Target, multiple_of: int, shape: Shape
) -> Shape | None:
    """`shape` with its free width changed to meet `target`; None if that is not enough."""
    free = free_dims(family)[-1]
    fixed = {dim: size for dim, size in shape.sizes.items() if dim != free}
    return _meet(family, config, target, multiple_of, shape.name, fixed, free)


def key_of(sizes: Sizes) -> tuple[tuple[str, int], ...]:
    """The sizes as a hashable key, by which shapes of equal sizes are found."""
    return tuple(sorted(sizes.items()))


def _meeting(
    family: Family,
    config: dict[str, Any],
    target: Target,
    multiple_of: int,
    fixed: list[Fixed],
) -> list[Shape]:
    """The distinct shapes that meet the target with these fixed cuts."""
    shapes: dict[tuple[tuple[str, int], ...], Shape] = {}
    total = family.count(config)
    for name, sizes, dims in fixed:
        for free in dims:
            shape = _meet(family, config, target, multiple_of, name, sizes, free)
            if shape is None:
                continue
            if target.keep_params is None:
                fits = free in shape.sizes or target.near(shape.sizes)
            else:
                fits = abs(shape.parameters / total - target.keep_params) <= TOLERANCE
            if fits:
                shapes.setdefault(key_of(shape.sizes), shape)
                break
    return list(shapes.values())


def _meet(
    family: Family,
    config: dict[str, Any],
    target: Target,
    multiple_of: int,
    name: str,
    sizes: Sizes,
    free: str,
) -> Shape | None:
    """`sizes` with the size of `free` closest to the share, or the widest within the limits."""
    full = family.sizes(config)
    if sizes.get("kv_heads") == 0:
        return None
    if "kv_heads" in sizes and "heads" not in sizes:
        sizes = {**sizes, "heads": full["heads"] // full["kv_heads"] * sizes["kv_heads"]}
    step = family.step(free, config, multiple_of, **sizes)
    widths = [*range(step, full[free], step), full[free]]
    if target.keep_params is not None:
        widths = _nearest(family, config, target.keep_params, sizes, free, widths)
    allowed = [width for width in widths if target.within({**sizes, free: width})]
    best = max(allowed, default=None) if target.keep_params is None else next(iter(allowed), None)
    if best is None:
        return None
    chosen = {dim: size for dim, size in {**sizes, free: best}.items() if size != full[dim]}
    if not chosen:  # the whole model meets the target, and there is nothing to cut
        return None
    if not families.can_have(family, config, chosen, multiple_of):
        return None
    return Shape(name, chosen, family.count(config, chosen))


def _nearest(
    family: Family,
    config: dict[str, Any],
    keep_params: float,
    sizes: Sizes,
    free: str,
    widths: list[int],
) -> list[int]:
    """The widths, sorted by how close they bring the parameters to the share."""
    # The number of parameters is linear in the free width, so two counts are enough.
    full = family.sizes(config)[free]
    least, most = (family.count(config, {**sizes, free: width}) for width in (0, full))
    wanted = (keep_params * family.count(config) - least) / (most - least) * full
    return sorted(widths, key=lambda width: abs(width - wanted))


def _least(
    family: Family, config: dict[str, Any], target: Target, multiple_of: int, dim: str
) -> Sizes:
    """The smallest size of `dim` that alone stays above the target; the MLP is cut for the rest."""
    full = family.sizes(config)
    step = family.step(dim, config, multiple_of)
    want = (target.keep_params or 0.0) * family.count(config)
    for size in range(step, full[dim] + 1, step):
        if target.keep_params is None:
            enough = not target.within({dim: size})
        else:
            enough = family.count(config, {dim: size}) >= want
        if enough:
            return {dim: size}
    return {}


def _alike(family: Family, config: dict[str, Any], multiple_of: int) -> Iterator[tuple[str, Sizes]]:
    """Equal cuts of all dimensions, in growing steps, for limits that no single cut can meet."""
    full = family.sizes(config)
    for scale in SCALES:
        kv_heads = max(1, round(scale * full["kv_heads"]))
        heads = full["heads"] // full["kv_heads"] * kv_heads
        sizes = {"layers": max(1, round(scale * full["layers"]))}
        sizes |= {"kv_heads": kv_heads, "heads": heads}
        step = family.step("hidden", config, multiple_of, **sizes)
        sizes["hidden"] = max(step, int(scale * full["hidden"]) // step * step)
        yield f"all axes × {scale:.2f}", {d: n for d, n in sizes.items() if n != full[d]}
    yield "smallest", smallest(family, config, multiple_of)


def check_keep_params(checkpoint: Checkpoint, config: PruneConfig) -> list[Shape]:
    """The candidate shapes for the target of `config`; raises UserError when none meets it.

    The list is empty for a latency target, because latencies must be measured first.
    """
    if not config.searches:
        check_target(checkpoint, config)
        return []
    if config.sizes() or config.plan:
        raise UserError(f"give {named(config)}, or sizes, or a plan: one of them")
    family = families.of(checkpoint)
    target = target_of(family, checkpoint.config, config)
    if config.timed:
        if target.keep_params is not None or (target.limits and not target.within({})):
            shapes_for(checkpoint, config, target)
        return []
    return shapes_for(checkpoint, config, target)


def to_try(config: PruneConfig, shapes: list[Shape]) -> int:
    """The number of shapes to try; 0 when there is nothing to choose."""
    if config.timed:
        return config.num_candidates
    return len(shapes) if len(shapes) > 1 else 0


def shapes_for(checkpoint: Checkpoint, config: PruneConfig, target: Target) -> list[Shape]:
    """The candidate shapes for a target: up to 8 from a fixed list, or more from a grid."""
    if config.formats:
        return _in_formats(checkpoint, config)
    model = (families.of(checkpoint), checkpoint.config, target, config.multiple_of)
    if config.num_candidates <= HANDFUL:
        return candidates(*model)[: config.num_candidates]
    return grid(*model, config.num_candidates)


def _in_formats(checkpoint: Checkpoint, config: PruneConfig) -> list[Shape]:
    """The whole model in each format in which it meets the limits, and cuts in the other formats.

    Raises UserError when no shape meets them in any format, when the whole model meets them in all
    of them, and for a mixture of experts, whose experts are not rounded in memory.
    """
    family, parent = families.of(checkpoint), checkpoint.config
    if family.memory:
        raise UserError(
            f"formats: the experts of a {family.model_type} model are not rounded in memory; give "
            "one format instead"
        )
    shapes, refusals = list[Shape](), list[UserError]()
    share = max(1, config.num_candidates // len(config.formats))
    for name in dict.fromkeys(config.formats):
        only = config.model_copy(update={"formats": (), "format": name, "num_candidates": share})
        target = target_of(family, parent, only)
        if target.keep_params is None and target.within({}):
            shapes.append(Shape(f"whole model, {name}", {}, family.count(parent), name))
            continue
        try:
            cuts = shapes_for(checkpoint, only, target)
        except UserError as error:
            refusals.append(error)
            continue
        shapes += [replace(each, name=f"{each.name}, {name}", format=name) for each in cuts]
    if not shapes:
        raise refusals[0]
    if not any(shape.sizes for shape in shapes):
        raise UserError(
            f"{named(config)}: the whole model meets the limit in {', '.join(config.formats)}: "
            "nothing to cut; quantize it, or give less"
        )
    return shapes


def named(config: PruneConfig) -> str:
    """The names of the config's target fields."""
    return ", ".join(name for name in TARGETS if getattr(config, name) is not None)
