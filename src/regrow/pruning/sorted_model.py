"""Cut models quickly out of one model in memory whose units are sorted by importance.

After sorting, the best n units of a layer are its first n. Most of the tensors of a cut model are
then views: no copy, and no `from_pretrained`. The units of a layer may be permuted freely (query
heads inside their KV head, KV heads with their query heads, hidden channels in all tensors at
once), because the model computes the same function.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from regrow.families import Family, Replace, cut_tensor
from regrow.plan import Plan
from regrow.profile_folder import Profile
from regrow.pruning.cut import check, cut_config, cut_model

SORTED = ("hidden", "mlp", "heads", "kv_heads")


class SortedModel:
    """A model whose units were sorted, in place, into the order of `order`.

    `order` is a plan that keeps everything and lists the ids of a dimension in their new order.
    Dimensions that it does not list stay unsorted. Plans for `cut` use the ids of the unsorted
    model. Mixtures of experts are not sorted, and cutting them is slower.
    """

    def __init__(self, model: PreTrainedModel, family: Family, order: Plan | None = None) -> None:
        self.model, self.family = model, family
        self.config: dict[str, Any] = model.config.to_dict()
        self.order = order = None if family.memory else order
        if order is not None:
            for name, parameter in model.named_parameters():
                result = cut_tensor(name, parameter.data, order, family, self.config)
                assert result is not None and result[0] == name, name
                parameter.data = result[1]

    def cut(self, plan: Plan, replace: Replace | None = None, copied: bool = False) -> Any:
        """The cut model; unless `copied`, its weights are views of this model's where possible.

        `replace` receives each tensor in the order of the plan's ids; the tensor that it returns is
        then sorted into the order of this model. The result equals that of `cut_model` up to the
        order of the units.
        """
        if self.family.memory:  # experts are stacked in memory, so a subset cannot be a view
            return cut_model(self.model, plan, replace, self.family)
        check(plan, self.family, self.config)
        sorted_plan = self.positions(plan)
        tensors = {}
        for name, tensor in self.model.state_dict().items():
            result = cut_tensor(name, tensor, sorted_plan, self.family, self.config, _select)
            if result is None:
                continue
            new_name, kept = result
            if replace is not None and (value := replace(name, kept)) is not kept:
                kept = self._in_order(name, value, plan)
            tensors[new_name] = (
                kept.clone(memory_format=torch.contiguous_format) if copied else kept
            )
        return assemble(self.model, cut_config(self.config, plan, self.family), tensors)

    def positions(self, plan: Plan) -> Plan:
        """The same plan, with the positions of the kept units in this model (ascending) as ids."""
        if self.order is None:
            return plan
        places: dict[str, Any] = {}
        for dim in ("mlp", "heads", "kv_heads"):
            having = self.family.layers_of(dim, self.config)
            kept = {n: plan.kept(dim, n) for n in plan.kept_layers() if n in having}
            if kept and all(ids is not None for ids in kept.values()):
                places[dim] = {n: sorted(self._places(dim, n, ids)) for n, ids in kept.items()}
        if plan.hidden is not None:
            places["hidden"] = sorted(self._places("hidden", None, plan.hidden))
        return plan.model_copy(update=places)

    def _places(self, dim: str, layer: int | None, ids: list[int] | None) -> list[int]:
        """The positions of the units `ids` in this model; None means all units, in order of id."""
        assert self.order is not None
        count = self.order.before[dim]
        order = self.order.kept(dim, layer) or list(range(count))
        place = {unit: number for number, unit in enumerate(order)}
        return [place[unit] for unit in (range(count) if ids is None else ids)]

    def _in_order(self, name: str, value: Tensor, plan: Plan) -> Tensor:
        """Sort a tensor from the order of the plan's ids into the order of this model."""
        ref = self.family.find(name)
        assert ref is not None
        template, layer, _ = ref
        for axis, dim in enumerate(self.family.tensors[template].axes):
            if self.order is None or not isinstance(dim, str) or dim not in SORTED:
                continue
            places = torch.tensor(self._places(dim, layer, plan.kept(dim, layer)))
            width = self.family.tensors[template].rows_of(dim, plan.before)
            units = places.argsort()[:, None] * width + torch.arange(width)
            value = value.index_select(axis, units.flatten().to(value.device))
        return value


def order_by(
    family: Family, config: dict[str, Any], profile: Profile, criterion: str, dims: set[str]
) -> Plan:
    """A plan with all units of `dims`, the highest score first; ties are sorted by id.

    Raises UserError when the criterion has no scores for one of `dims`.
    """
    sizes = family.sizes(config)
    fields: dict[str, Any] = {}
    if family.memory:  # mixtures of experts are not sorted
        dims = set()
    if "hidden" in dims:
        fields["hidden"] = _ranked(profile.scores(criterion, "hidden")["all"])
    for dim in {"mlp", "kv_heads"} & dims:
        scores = profile.scores(criterion, dim)
        layers = family.layers_of(dim, config)
        fields[dim] = {layer: _ranked(scores[str(layer)]) for layer in layers}
    if "heads" in dims:
        group, scores = sizes["heads"] // sizes["kv_heads"], profile.scores(criterion, "heads")
        plain = list(range(sizes["kv_heads"]))
        fields["heads"] = {
            layer: [
                kv * group + head
                for kv in fields.get("kv_heads", {}).get(layer, plain)
                for head in _ranked(scores[str(layer)][kv * group : (kv + 1) * group])
            ]
            for layer in family.layers_of("heads", config)
        }
    return Plan(model_type=family.model_type, fingerprint="", before=sizes, after=sizes, **fields)


def first_units(family: Family, config: dict[str, Any], sizes: dict[str, int]) -> Plan:
    """A plan of these sizes that keeps the first units; it is used for timing, not for scoring."""
    before = family.sizes(config)
    after = {**before, **sizes}
    layers = list(range(after["layers"]))
    group, keep = (size["heads"] // size["kv_heads"] for size in (before, after))
    kv_heads = range(after["kv_heads"])
    heads = [kv * group + head for kv in kv_heads for head in range(keep)]
    with_mlp, with_experts, with_heads = (
        [layer for layer in layers if layer in family.layers_of(dim, config)]
        for dim in ("mlp", "experts", "heads")
    )
    experts = range(after.get("experts", 0))
    channels = list(range(after.get("expert_mlp", 0)))
    return Plan(
        model_type=family.model_type,
        fingerprint="",
        before=before,
        after=after,
        layers=list(layers),
        hidden=list(range(after["hidden"])) if after["hidden"] != before["hidden"] else None,
        mlp={layer: list(range(after.get("mlp", 0))) for layer in with_mlp} or None,
        experts={layer: list(experts) for layer in with_experts} or None,
        expert_mlp={layer: dict.fromkeys(experts, channels) for layer in with_experts} or None,
        heads=dict.fromkeys(with_heads, heads) or None,
        kv_heads={layer: list(kv_heads) for layer in with_heads} or None,
    )


def assemble(
    like: PreTrainedModel, config: dict[str, Any], tensors: dict[str, Tensor]
) -> PreTrainedModel:
    """A model of `like`'s class with this config and exactly these tensors, in eval mode."""
    kind: Any = type(like)
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = kind._from_config(
            type(like.config).from_dict(config),
            dtype=like.dtype,
            attn_implementation=like.config._attn_implementation,
        )
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    assert not any(p.is_meta for p in model.parameters()), "a tensor of the model is missing"
    model.generation_config = copy.deepcopy(like.generation_config)
    cut: PreTrainedModel = model.to(like.device).eval()
    return cut.requires_grad_(False)


def _ranked(scores_n: Tensor) -> list[int]:
    ids: list[int] = scores_n.argsort(descending=True, stable=True).tolist()
    return ids


def _select(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """Like `index_select`, but a view if the index is a range without gaps."""
    first, count = int(index[0]), len(index)
    if int(index[-1]) - first + 1 == count:  # the index is ascending, so it has no gap
        return tensor.narrow(axis, first, count)
    return tensor.index_select(axis, index)
