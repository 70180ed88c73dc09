"""What a plan makes of a family's tensors and config: select the kept units along named axes.

If the dropped units are zero, the cut model computes the same output as before. For hidden,
selection alone is not enough. RMSNorm (Zhang and Sennrich 2019), y = w·x / sqrt(Σx²/d + eps), then
divides by d_new instead of d_old, so y stays the same only with

    w' = w · sqrt(d_old / d_new)        eps' = eps · d_old / d_new

The same holds for a norm over all heads of a layer (OLMo 2), whose eps is left as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from regrow.errors import UserError
from regrow.families._refusals import check_sizes
from regrow.families._rows import Tensor as Row
from regrow.families._rows import TensorRef, parts
from regrow.families._table import Family
from regrow.plan import PER_EXPERT, PER_LAYER, Plan

if TYPE_CHECKING:
    from torch import Tensor

Replace = Callable[[str, "Tensor"], "Tensor"]
"""(name in the parent, cut tensor) → a replacement of the same shape and dtype."""
Select = Callable[["Tensor", int, "Tensor"], "Tensor"]


def check_plan(plan: Plan, family: Family, config: dict[str, Any]) -> None:
    """Raise UserError when `plan` cannot be applied to a model of this family and config."""
    if plan.model_type != family.model_type:
        raise UserError(f"plan: made for a {plan.model_type} model, not for a {family.model_type}")
    sizes = family.sizes(config)
    plan.check(sizes, {dim: family.layers_of(dim, config) for dim in (*PER_LAYER, PER_EXPERT)})
    check_sizes(family, config, {dim: plan.after[dim] for dim in plan.after if dim in sizes})


def cut(
    tensors: Iterable[tuple[str, Tensor]],
    plan: Plan,
    family: Family,
    config: dict[str, Any],
    replace: Replace | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the cut model, one by one, under their new names; `config` is the parent's.

    `replace` may substitute other values for a cut tensor (repair). Raises UserError for a tensor
    that does not fit the family.
    """
    for name, tensor in tensors:
        found = cut_tensor(name, tensor, plan, family, config)
        if found is not None:
            renamed, kept = found
            if replace is not None:
                value = replace(name, kept)
                assert value.shape == kept.shape and value.dtype == kept.dtype, name
                kept = value
            yield renamed, kept


def cut_tensor(
    name: str,
    tensor: Tensor,
    plan: Plan,
    family: Family,
    config: dict[str, Any],
    select: Select | None = None,
) -> tuple[str, Tensor] | None:
    """A tensor's new name and kept part; None if its layer or expert is dropped, or if it is tied.

    `select` takes (tensor, axis, index). A tensor that is kept completely is returned without
    a copy. Raises UserError for a name that the family's table lacks.
    """
    import torch

    renamed = new_name(name, plan, family, config)
    if renamed is None:
        return None
    place = _find(name, family)
    row, select = family.tensors[place.template], select or torch.index_select
    stacked = row.has("experts") and row.has(PER_EXPERT)
    if stacked and plan.kept(PER_EXPERT, place.layer, 0) is not None:
        tensor = _cut_stacked(tensor, row, place, plan)
    else:
        tensor = _selected(tensor, row.axes, row, place, plan, select)
    return renamed, _rescaled(place.template, tensor, plan, family, config)


def _selected(
    tensor: Tensor, axes: tuple[Any, ...], row: Row, place: TensorRef, plan: Plan, select: Select
) -> Tensor:
    for axis, dims in enumerate(axes):
        index = _index(parts(dims), row, place, plan)
        if index is not None:
            tensor = select(tensor, axis, index.to(tensor.device))
    return tensor


def _cut_stacked(tensor: Tensor, row: Row, place: TensorRef, plan: Plan) -> Tensor:
    """Cut a tensor of all experts of a layer, of which each keeps channels of its own."""
    import torch

    assert row.axes[0] == "experts" and place.layer is not None
    kept = [
        _selected(
            tensor[expert], row.axes[1:], row, place._replace(expert=expert), plan,
            torch.index_select,
        )
        for expert in plan.kept_experts(place.layer)
    ]  # fmt: skip
    return torch.stack(kept)


def cut_config(config: dict[str, Any], plan: Plan, family: Family) -> dict[str, Any]:
    """The cut model's config.json: new widths, explicit head_dim, and only the kept layers.

    Token ids that the config names are not changed.
    """
    new = copy.deepcopy(config)
    for dim, key in family.config_keys.items():
        known = [name for name in (key, family.aliases.get(key, key)) if name in config]
        new.update(dict.fromkeys(known or [key], plan.after[dim]))
    if family.writes_head_dim:
        new["head_dim"] = plan.before["head_dim"]
    if plan.hidden is not None:
        ratio = plan.before["hidden"] / plan.after["hidden"]
        new[family.eps] = family.value(config, family.eps) * ratio
    if plan.layers is not None:
        _follow_layers(new, plan.layers, plan.before["layers"], family)
    return new


def _find(name: str, family: Family) -> TensorRef:
    found = family.find(name)
    if found is None:
        raise UserError(
            f"{name}: no tensor of a {family.model_type} model has this name; to add it, read "
            "docs/add-a-family.md"
        )
    return found


def new_name(name: str, plan: Plan, family: Family, config: dict[str, Any]) -> str | None:
    """A tensor's name after the cut; None if its layer is dropped or if it is a tied head.

    Raises UserError for a name that the family's table lacks.
    """
    template, layer, expert = _find(name, family)
    if template == family.head and not family.exists(family.tensors[template], config):
        return None
    if layer is None:
        return name
    layers = plan.kept_layers()
    if layer not in layers:
        return None
    if expert is not None:
        experts = plan.kept_experts(layer)
        if expert not in experts:
            return None
        expert = experts.index(expert)
    return TensorRef(template, layers.index(layer), expert).name


def _index(dims: tuple[str, ...], row: Row, place: TensorRef, plan: Plan) -> Tensor | None:
    """The kept rows of an axis that concatenates these dimensions; None if all are kept."""
    import torch

    kept = [plan.kept(dim, place.layer, place.expert) for dim in dims]
    if all(ids is None for ids in kept):
        return None
    pieces, offset = [], 0
    for dim, ids in zip(dims, kept, strict=True):
        count, width = plan.before[dim], row.rows_of(dim, plan.before)
        units = torch.arange(count) if ids is None else torch.tensor(ids)
        pieces.append(offset + (units[:, None] * width + torch.arange(width)).flatten())
        offset += count * width
    return torch.cat(pieces)


def _rescaled(
    template: str, tensor: Tensor, plan: Plan, family: Family, config: dict[str, Any]
) -> Tensor:
    """The tensor times its factor from the module's docstring, if it has one.

    Gemma multiplies its embedding by sqrt(hidden_size). The embedding is therefore scaled by the
    same factor as the norms, so that the residual stream equals the kept channels of the dense
    model. A tied head then multiplies the logits by that factor, so the final norm is not scaled.
    """
    row = family.tensors[template]
    scaled_head = family.scaled_embedding and bool(family.value(config, "tie_word_embeddings"))
    takes_factor = row.norm and not (template == family.final_norm and scaled_head)
    if template == family.embedding:
        takes_factor = family.scaled_embedding
    (dim,) = parts(row.axes[0])[:1] or ("hidden",) if row.norm else ("hidden",)
    if not takes_factor or plan.before[dim] == plan.after[dim]:
        return tensor
    factor = math.sqrt(plan.before[dim] / plan.after[dim])
    offset = family.norm_offset if row.norm else 0.0
    return ((_wide(tensor) + offset) * factor - offset).to(tensor.dtype)


def _wide(tensor: Tensor) -> Tensor:
    from regrow.runtime.precision import widen

    return widen(tensor)


def _follow_layers(new: dict[str, Any], layers: list[int], count: int, family: Family) -> None:
    if family.sliding_period is not None:
        _name_layer_types(new, layers, count, family.sliding_period)
    if family.dense_layers is not None:
        # Every nth layer of the parent has experts. After the cut the rule fails: list the ids.
        ids, period = family.dense_layers
        sparse = family.layers_of("experts", {**new, family.config_keys["layers"]: count})
        new.update({ids: [n for n in range(count) if n not in sparse], period: 1})
    for key, kind in family.per_layer_config.items():
        value = new.get(key)
        if value is None and family.derived:
            value = family.defaults.get(key)
        if value is None:
            continue
        if kind == "each":
            new[key] = [value[i] for i in layers]
        elif kind == "ids":
            new[key] = [layers.index(i) for i in value if i in layers]
        else:
            new[key] = sum(i < value for i in layers)


def _name_layer_types(
    new: dict[str, Any], layers: list[int], count: int, rule: tuple[str, int]
) -> None:
    """Write the layer types that follow from a period, and drop the period if it then fails."""
    key, default = rule
    period = new.get(key) or default
    types = [
        "full_attention" if n % period == 0 else "sliding_attention" for n in range(1, count + 1)
    ]
    if not new.get("layer_types"):
        new["layer_types"] = types
    if [new["layer_types"][i] for i in layers] != types[: len(layers)]:
        new.pop(key, None)
        new.pop(f"_{key}", None)
