"""Plans of random units for the proofs, and models in which the dropped units are zero."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from regrow.families._rows import parts
from regrow.families._table import Family
from regrow.plan import Plan


def plan_for(family: Family, config: dict[str, Any], after: Mapping[str, Any]) -> Plan:
    """A plan that keeps random units; `after` has new sizes, or the kept layers or experts."""
    before, draw = family.sizes(config), random.Random(0)
    sizes = {dim: n if isinstance(n, int) else len(n) for dim, n in after.items()}
    fields: dict[str, Any] = {}
    for dim in ("hidden", "vocab", "layers"):
        if dim in after:
            keep = after[dim]
            fields[dim] = _some(draw, before[dim], keep) if isinstance(keep, int) else keep
    layers = fields.get("layers", list(range(before["layers"])))

    def having(dim: str) -> list[int]:
        return [n for n in layers if n in family.layers_of(dim, config)]

    for dim in ("mlp", "kv_heads"):
        if dim in after:
            fields[dim] = {n: _some(draw, before[dim], sizes[dim]) for n in having(dim)}
    if "heads" in after:
        fields["heads"] = {n: _heads(draw, before, sizes, fields, n) for n in having("heads")}
    elif "kv_heads" in after:
        sizes["heads"] = sizes["kv_heads"] * (before["heads"] // before["kv_heads"])
    if "experts" in after:
        fields["experts"] = {n: after["experts"][n] for n in layers if n in after["experts"]}
        sizes["experts"] = len(next(iter(after["experts"].values())))
    if "expert_mlp" in after:
        width = sizes["expert_mlp"]
        fields["expert_mlp"] = {
            n: {e: _some(draw, before["expert_mlp"], width) for e in range(before["experts"])}
            for n in having("expert_mlp")
        }
    full = {**before, **sizes}
    return Plan(model_type=family.model_type, fingerprint="", before=before, after=full, **fields)


def _heads(
    draw: random.Random, before: dict[str, int], sizes: dict[str, int], fields: Any, layer: int
) -> list[int]:
    """Random query heads of a layer, equally many for each kept KV head."""
    group = before["heads"] // before["kv_heads"]
    kept = fields.get("kv_heads", {}).get(layer, list(range(before["kv_heads"])))
    each = sizes["heads"] // len(kept)
    return [kv * group + head for kv in kept for head in _some(draw, group, each)]


def _some(draw: random.Random, count: int, keep: int) -> list[int]:
    return sorted(draw.sample(range(count), keep))


def zeroed(family: Family, tensors: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The tensors with zeros in every row of the units that `plan` drops."""
    changed = {}
    for name, tensor in tensors.items():
        place = family.find(name)
        assert place is not None, name
        row, tensor = family.tensors[place.template], tensor.clone()
        for axis, dims in enumerate(row.axes):
            start = 0
            for dim in parts(dims):
                count, width = plan.before[dim], row.rows_of(dim, plan.before)
                _zero(tensor, axis, start, width, dim, plan, place, row.has("experts"))
                start += count * width
        changed[name] = tensor
    return changed


def _zero(
    tensor: Tensor,
    axis: int,
    start: int,
    width: int,
    dim: str,
    plan: Plan,
    place: Any,
    stacked: bool,
) -> None:
    if dim in ("layers", "vocab", "experts"):
        return
    targets: Iterable[tuple[Tensor, int | None]] = [(tensor, place.expert)]
    if dim == "expert_mlp" and stacked and place.expert is None:
        targets, axis = [(part, expert) for expert, part in enumerate(tensor)], axis - 1
    for target, expert in targets:
        kept = plan.kept(dim, place.layer, expert)
        for unit in sorted(set(range(plan.before[dim])) - set(kept)) if kept is not None else ():
            target.narrow(axis, start + unit * width, width).zero_()
