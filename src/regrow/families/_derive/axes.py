"""The dimension of each axis: change one size of a tiny config, and see which axes change.

An axis of length L that grows by c rows for each unit of a dimension of n units, and by nothing
else, has that dimension if L = c · n. An axis that grows with several sizes is fused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from regrow.errors import reason_of
from regrow.families._derive.stock import UnsupportedError, shapes
from regrow.families._derive.tiny import EXPERTS, HEADS, KV_HEADS, Tiny, template_of, with_layers
from regrow.families._rows import Axis

MLP_KEYS = re.compile(r"(intermediate|ffn|mlp|expert).*(size|dim|width)$|^(ffn_dim|d_ff|n_inner)$")
Shapes = dict[str, tuple[int, ...]]
Layout = tuple[tuple[str, ...], bool]
"""The fused parts of an axis in order, and whether a unit takes the usual number of rows."""


@dataclass
class Found:
    """What the sizes of a config say about the tensors of its model."""

    keys: dict[str, str]
    """The config key of each dimension."""
    layouts: dict[str, list[list[Layout]]] = field(default_factory=dict)
    """For each template and axis the layouts that the axis may have; none for a fixed axis."""
    refused: dict[str, str] = field(default_factory=dict)
    """Dimensions that cannot be cut, with the reason."""
    head_rows: int = 0
    """Channels of one head, in the copy, in the projection that reads the heads."""
    writes_head_dim: bool = False
    kv_heads_unused: bool = False
    """Whether every query head has its own keys and values, whatever the config says."""
    per_head: frozenset[tuple[str, int]] = frozenset()
    """Axes (template, axis) that are the channels of one head."""


def find_axes(tiny: Tiny) -> tuple[Found, dict[str, Any]]:
    """The possible layouts of each axis, and the tiny config with an explicit head_dim.

    Raises UnsupportedError when the config lacks the size of a dimension that every decoder has.
    """
    config = dict(tiny.config)
    for key in ("hidden_size", "vocab_size"):
        if not isinstance(config.get(key), int):
            raise UnsupportedError(f"its config has no {key}")
    base = of_templates(config)
    head_dim, no_head_dim = _explicit_head_dim(config, base)
    if head_dim is not None:
        config["head_dim"] = head_dim
        base = of_templates(config)
    found = Found(_keys(config, base), writes_head_dim=head_dim is not None)
    found.kv_heads_unused = _no_kv_heads(config, base, found.keys)
    if found.kv_heads_unused:
        config[KV_HEADS] = config[HEADS]
        base = of_templates(config)
    changes: dict[str, tuple[int, Shapes | str]] = {
        dim: _change(config, base, dim, key) for dim, key in found.keys.items() if dim != "layers"
    }
    fewer = list(range(len(tiny.layers) - 1))
    changes["layers"] = -1, of_templates(with_layers(config, tiny.per_layer, fewer))
    if found.keys["kv_heads"] == found.keys["heads"]:
        changes.pop("kv_heads")
    usable: dict[str, tuple[int, Shapes]] = {}
    for dim, (step, changed) in changes.items():
        if isinstance(changed, str):
            said = f"no other {found.keys[dim]} builds a model of this config: {changed}"
            found.refused[dim] = said
        else:
            usable[dim] = step, changed
    if no_head_dim and "heads" in found.refused:
        found.refused["heads"] += f"; no other head_dim does: {no_head_dim}"
    if head_dim is not None:
        wide = of_templates({**config, "head_dim": head_dim + 8})
        found.per_head = frozenset(
            (name, axis)
            for name, shape in base.items()
            for axis, length in enumerate(shape)
            if length == head_dim and wide.get(name, shape)[axis] == length + 8
        )
    growth = {name: _growth(name, shape, usable) for name, shape in base.items()}
    found.head_rows = _head_rows(growth, config)
    if head_dim is not None and found.head_rows != head_dim:  # it is the width of something else
        found.writes_head_dim, found.per_head = False, frozenset()
    for name, shape in base.items():
        found.layouts[name] = [
            _layouts(found, name, length, axis, config)
            for length, axis in zip(shape, growth[name], strict=True)
        ]
    _refuse_shared(found)
    if isinstance(tiny.config.get("n_group"), int) and tiny.config["n_group"] > 1:
        found.refused["experts"] = (
            "its router first chooses groups of experts (n_group), which a cut would mix"
        )
    return found, config


def _refuse_shared(found: Found) -> None:
    """Refuse channels of experts if a tensor that all tokens use has the same size."""
    for name, axes in found.layouts.items():
        dims = {dim for layouts in axes for layout in layouts[:1] for dim in layout[0]}
        if "expert_mlp" in dims and "experts" not in dims:
            found.refused["expert_mlp"] = (
                f"the width of {name.removesuffix('.weight')}, which every token uses, follows the "
                f"same {found.keys['expert_mlp']}"
            )


def of_templates(config: dict[str, Any]) -> Shapes:
    """Shape of each template; the number of layers does not matter."""
    return {template_of(name)[0]: shape for name, shape in shapes(config).items()}


def _explicit_head_dim(config: dict[str, Any], base: Shapes) -> tuple[int | None, str]:
    """The head_dim of the copy, if its class reads it; and why no other one builds a model."""
    usual = config.get("head_dim") or config["hidden_size"] // config[HEADS]
    try:
        other = of_templates({**config, "head_dim": usual + 8})
    except Exception as error:  # whatever the class raises for sizes that contradict each other
        return None, reason_of(error)
    heads = [name for name in base if other.get(name) != base[name]]
    projections = [name for name in heads if len(base[name]) == 2]
    return (int(usual) if projections else None), ""


def _keys(config: dict[str, Any], base: Shapes) -> dict[str, str]:
    keys = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": HEADS,
        "kv_heads": KV_HEADS if isinstance(config.get(KV_HEADS), int) else HEADS,
        "vocab": "vocab_size",
    }
    experts = [key for key in EXPERTS if isinstance(config.get(key), int) and config[key] > 1]
    widths = [key for key, value in config.items() if MLP_KEYS.search(key) and _is_size(value)]
    for key in experts[:1]:
        _, changed = _change(config, base, "experts", key)
        if not isinstance(changed, str) and changed != base:
            keys["experts"] = key
    for key in widths:
        _, changed = _change(config, base, "mlp", key)
        if isinstance(changed, str) or changed == base:
            continue
        dim = _width_of(base, changed, config, keys.get("experts"))
        if dim is not None and dim not in keys:
            keys[dim] = key
    return keys


def _no_kv_heads(config: dict[str, Any], base: Shapes, keys: dict[str, str]) -> bool:
    """Whether a config key for KV heads has no effect on any tensor."""
    if keys["kv_heads"] == HEADS or config.get(KV_HEADS) == config[HEADS]:
        return False
    return _change(config, base, "kv_heads", KV_HEADS)[1] == base


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _width_of(
    base: Shapes, changed: Shapes, config: dict[str, Any], experts: str | None
) -> str | None:
    """Which dimension a width is: of an MLP, or of experts if a tensor of theirs has it."""
    names = [name for name in base if changed.get(name) != base[name]]
    if experts is not None:
        count = config[experts]
        if any(".experts." in n or (len(base[n]) == 3 and base[n][0] == count) for n in names):
            return "expert_mlp"
    plain = [name for name in names if ".mlp." in name or "feed_forward" in name or "ffn" in name]
    return "mlp" if plain and not any("shared" in name for name in names) else None


def _change(config: dict[str, Any], base: Shapes, dim: str, key: str) -> tuple[int, Shapes | str]:
    """By how much the size of a dimension was changed, and the shapes after that.

    Where no other size builds a model, what the class says instead of the shapes.
    """
    now, said = config[key], ""
    steps = {"heads": [now], "kv_heads": [now], "hidden": [now], "vocab": [16]}
    for step in steps.get(dim, [now, 8, 32]):
        new = {**config, key: now + step}
        if dim == "heads" and config.get(KV_HEADS) == config[HEADS]:
            new[KV_HEADS] = now + step
        if dim == "kv_heads" and config.get(KV_HEADS, config[HEADS]) == config[HEADS]:
            return step, base  # the same heads
        try:
            return step, of_templates(new)
        except Exception as error:  # whatever the class raises for sizes that do not fit
            said = said or reason_of(error)
    return 1, said


def _growth(
    name: str, shape: tuple[int, ...], changes: dict[str, tuple[int, Shapes]]
) -> list[dict[str, float]]:
    """For each axis the rows that it gains for one more unit of each dimension."""
    axes: list[dict[str, float]] = [{} for _ in shape]
    for dim, (step, changed) in changes.items():
        other = changed.get(name)
        if other is None or len(other) != len(shape):
            continue
        for axis, (before, after) in enumerate(zip(shape, other, strict=True)):
            if after != before:
                axes[axis][dim] = (after - before) / step
    return axes


def _head_rows(growth: dict[str, list[dict[str, float]]], config: dict[str, Any]) -> int:
    """Channels of a head in the projection that reads the heads and writes the stream."""
    for axes in growth.values():
        if len(axes) == 2 and set(axes[0]) == {"hidden"} and set(axes[1]) == {"heads"}:
            return int(axes[1]["heads"])
    return int(config.get("head_dim") or config["hidden_size"] // config[HEADS])


def _layouts(
    found: Found, name: str, length: int, axis: dict[str, float], config: dict[str, Any]
) -> list[Layout]:
    """The layouts that an axis may have; a dimension that no layout explains is refused."""
    sizes = {dim: config[key] for dim, key in found.keys.items()}
    if not axis:
        return []
    rest = length - sum(rows * sizes[dim] for dim, rows in axis.items())
    whole = all(rows == int(rows) and rows > 0 for rows in axis.values())
    if whole and rest == 0 and len(axis) == 1:
        ((dim, rows),) = axis.items()
        usual = found.head_rows if dim in ("heads", "kv_heads") else 1
        if dim == "hidden" and rows != 1:
            found.refused[dim] = f"{name} has {int(rows)} rows for each channel of hidden_size"
            return []
        return _of_one(dim, int(rows), usual)
    if whole and rest == 0 and set(axis) == {"heads", "kv_heads"}:
        once = axis["heads"]
        if axis["kv_heads"] == 2 * once == 2 * found.head_rows:
            return [(("heads", "kv_heads", "kv_heads"), True)]
    for dim in axis:
        keys = " and ".join(found.keys[each] for each in axis)
        found.refused[dim] = f"an axis of {name} follows {keys} in a way that no cut can express"
    return []


def _of_one(dim: str, rows: int, usual: int) -> list[Layout]:
    """Layouts of an axis of one dimension: a unit's rows are together, or in separate parts."""
    if rows == usual:
        return [((dim,), True)]
    if rows % usual == 0 and rows // usual in (2, 3):
        count = rows // usual
        return [((dim,) * count, True), ((dim,), False)]
    return [((dim,), False)]


def axis_of(layout: Layout | None, length: int) -> Axis:
    """The axis of a row with this layout, or its fixed length."""
    if layout is None:
        return length
    dims, _ = layout
    return dims[0] if len(dims) == 1 else dims
