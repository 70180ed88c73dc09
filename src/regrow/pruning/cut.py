"""Cut a model to a plan: select the kept units along the named axes of each tensor.

If the dropped units are zero, the cut model computes the same output as before. For hidden,
selection alone is not enough. RMSNorm (Zhang and Sennrich 2019), y = w·x / sqrt(Σx²/d + eps), then
divides by d_new instead of d_old, so y stays the same only with

    w' = w · sqrt(d_old / d_new)        eps' = eps · d_old / d_new
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.checkpoint import checkpoint as checkpoints
from regrow.errors import UserError
from regrow.families import Family, TensorRef, as_on_disk, parts, unit_rows
from regrow.layerwise import LayerByLayer
from regrow.plan import PER_EXPERT, PER_LAYER, Plan
from regrow.pruning.tokenizer import cut_ids, ids_named, read_rules, write_tokenizer
from regrow.runtime.precision import widen

Replace = Callable[[str, Tensor], Tensor]
"""(name in the parent, cut tensor) → a replacement of the same shape and dtype."""


def check(plan: Plan, family: Family, config: dict[str, Any]) -> None:
    """Raise UserError when `plan` cannot be applied to a model of this family and config."""
    if plan.model_type != family.model_type:
        raise UserError(f"plan: made for a {plan.model_type} model, not for a {family.model_type}")
    sizes = family.sizes(config)
    plan.check(sizes, {dim: family.layers_of(dim, config) for dim in (*PER_LAYER, PER_EXPERT)})
    families.check_sizes(
        family, config, {dim: plan.after[dim] for dim in plan.after if dim in sizes}
    )
    if plan.vocab is not None:
        gone = ids_named(config) & set(range(plan.before["vocab"])) - set(plan.vocab)
        if gone:
            raise UserError(
                f"plan: vocab lacks token {min(gone)}, which config.json uses: add it to the plan"
            )


def cut(
    tensors: Iterable[tuple[str, Tensor]],
    plan: Plan,
    family: Family,
    config: dict[str, Any],
    replace: Replace | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the cut model, one by one, under their new names; `config` is the parent's.

    `replace` may substitute other values for a cut tensor (repair). Raises UserError for a plan or
    a tensor that does not fit the family.
    """
    check(plan, family, config)
    for name, tensor in tensors:
        result = cut_tensor(name, tensor, plan, family, config)
        if result is not None:
            renamed, kept = result
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
    select: Callable[[Tensor, int, Tensor], Tensor] = torch.index_select,
) -> tuple[str, Tensor] | None:
    """A tensor's new name and kept part; None if its layer or expert is dropped, or if it is tied.

    `select` takes (tensor, axis, index). A tensor that is kept completely is returned without
    a copy. Raises UserError for a name that the family's table lacks.
    """
    renamed = new_name(name, plan, family, config)
    if renamed is None:
        return None
    place = _find(name, family)
    for axis, dims in enumerate(family.tensors[place.template].axes):
        index = _index(parts(dims), place, plan)
        if index is not None:
            tensor = select(tensor, axis, index.to(tensor.device))
    return renamed, _rescaled(place.template, tensor, plan, family, config)


def cut_config(config: dict[str, Any], plan: Plan, family: Family) -> dict[str, Any]:
    """The cut model's config.json: new widths, explicit head_dim, and only the kept layers."""
    new = copy.deepcopy(config)
    for dim, key in family.config_keys.items():
        present = [name for name in (key, family.aliases.get(key, key)) if name in config]
        new.update(dict.fromkeys(present or [key], plan.after[dim]))
    new["head_dim"] = plan.before["head_dim"]
    if plan.vocab is not None:
        new = cut_ids(new, plan.vocab)
    if plan.hidden is not None:
        ratio = plan.before["hidden"] / plan.after["hidden"]
        new["rms_norm_eps"] = family.value(config, "rms_norm_eps") * ratio
    if plan.layers is not None:
        _follow_layers(new, plan.layers, plan.before["layers"], family)
    return new


def cut_folder(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    replace: Replace | None = None,
    family: Family | None = None,
) -> None:
    """Write the cut checkpoint to `out`, tensor by tensor; `family` defaults to the model's own.

    Raises UserError when the plan was made for another model or does not fit.
    """
    config = checkpoint.config
    family = family or families.get(config["model_type"])
    plan.check_fingerprint(checkpoint)
    check(plan, family, config)
    if plan.vocab is not None and checkpoint.has_tokenizer:
        read_rules(checkpoint)  # raises, before the slow work, if it cannot be cut
    family.check_tensors(config, checkpoint.shapes)
    names = [n for n in checkpoint.names() if new_name(n, plan, family, config) is not None]
    layout = dict(cut(((name, checkpoint.meta(name)) for name in names), plan, family, config))
    tensors = cut(((n, checkpoint.tensor(n)) for n in names), plan, family, config, replace)
    checkpoints.write(out, cut_config(config, plan, family), layout, tensors, like=checkpoint)
    if plan.vocab is not None:
        write_tokenizer(checkpoint, plan.vocab, out)


def cut_model(
    model: PreTrainedModel,
    plan: Plan,
    replace: Replace | None = None,
    family: Family | None = None,
) -> PreTrainedModel:
    """A cut copy of a model in memory, on the same device, in eval mode, with its own weights.

    `family` defaults to the model's own. Raises UserError when the plan does not fit.
    """
    config = model.config.to_dict()
    family = family or families.get(config["model_type"])
    check(plan, family, config)
    state = as_on_disk(family, model.state_dict())
    family.check_tensors(config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    _refuse_untied(state, family, config)
    shared = {tensor.data_ptr() for tensor in state.values()}
    kept = {
        name: tensor.clone() if tensor.data_ptr() in shared else tensor
        for name, tensor in cut(state.items(), plan, family, config, replace)
    }
    new_config = type(model.config).from_dict(cut_config(config, plan, family))
    student: PreTrainedModel = type(model).from_pretrained(
        None,
        config=new_config,
        state_dict=kept,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        experts_implementation=model.config._experts_implementation,
    )
    student.generation_config = copy.deepcopy(model.generation_config)
    if plan.vocab is not None and student.generation_config is not None:
        student.generation_config.update(**cut_ids(model.generation_config.to_dict(), plan.vocab))
    return student.to(model.device).eval()  # type: ignore[arg-type]


def cut_layers(
    checkpoint: Checkpoint,
    plan: Plan,
    family: Family,
    device: torch.device,
    replace: Replace | None = None,
    like: LayerByLayer | None = None,
) -> LayerByLayer:
    """The cut model, with one layer at a time in memory.

    `like` is the dense model; its embedding is shared if the plan does not change it.
    """
    config = checkpoint.config
    parents: dict[str, str] = {}
    for name in checkpoint.names():
        renamed = new_name(name, plan, family, config)
        if renamed is not None:
            parents[renamed] = name

    def read(name: str) -> Tensor:
        parent = parents[name]
        result = cut_tensor(parent, checkpoint.tensor(parent), plan, family, config)
        assert result is not None and result[0] == name
        return result[1] if replace is None else replace(parent, result[1])

    stock = AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    small = type(stock).from_dict(cut_config(config, plan, family))
    shared = like if plan.hidden is None and plan.vocab is None else None
    return LayerByLayer(
        family, small, parents, read, checkpoint.compute_dtype(), device, like=shared
    )


def _find(name: str, family: Family) -> TensorRef:
    ref = family.find(name)
    if ref is None:
        raise UserError(
            f"{name}: no tensor of a {family.model_type} model has this name; to add it, read "
            "docs/add-a-family.md"
        )
    return ref


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


def _index(dims: tuple[str, ...], place: TensorRef, plan: Plan) -> Tensor | None:
    """The kept rows of an axis that concatenates these dimensions; None if all are kept."""
    kept = [plan.kept(dim, place.layer, place.expert) for dim in dims]
    if all(ids is None for ids in kept):
        return None
    parts, offset = [], 0
    for dim, ids in zip(dims, kept, strict=True):
        count, width = plan.before[dim], unit_rows(dim, plan.before)
        units = torch.arange(count) if ids is None else torch.tensor(ids)
        parts.append(offset + (units[:, None] * width + torch.arange(width)).flatten())
        offset += count * width
    return torch.cat(parts)


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
    if not takes_factor or plan.before["hidden"] == plan.after["hidden"]:
        return tensor
    factor = math.sqrt(plan.before["hidden"] / plan.after["hidden"])
    offset = family.norm_offset if row.norm else 0.0
    wide = widen(tensor)
    return ((wide + offset) * factor - offset).to(tensor.dtype)


def _follow_layers(new: dict[str, Any], layers: list[int], count: int, family: Family) -> None:
    if family.sliding_period is not None:
        key, default = family.sliding_period
        period = new.get(key) or default
        types = [
            "full_attention" if n % period == 0 else "sliding_attention"
            for n in range(1, count + 1)
        ]
        if not new.get("layer_types"):
            new["layer_types"] = types
        if [new["layer_types"][i] for i in layers] != types[: len(layers)]:
            new.pop(key, None)
            new.pop(f"_{key}", None)
    if family.dense_layers is not None:
        # Every nth layer of the parent has experts. After the cut the rule fails: list the ids.
        ids, period = family.dense_layers
        sparse = family.layers_of("experts", {**new, family.config_keys["layers"]: count})
        new.update({ids: [n for n in range(count) if n not in sparse], period: 1})
    for key, kind in family.per_layer_config.items():
        value = new.get(key)
        if value is None:
            continue
        if kind == "each":
            new[key] = [value[i] for i in layers]
        elif kind == "ids":
            new[key] = [layers.index(i) for i in value if i in layers]
        else:
            new[key] = sum(i < value for i in layers)


def _refuse_untied(state: dict[str, Tensor], family: Family, config: dict[str, Any]) -> None:
    """Refuse a tied config whose head has values of its own, which would be lost silently."""
    tied = not family.exists(family.tensors[family.head], config)
    if not tied or family.head not in state:
        return
    if not torch.equal(state[family.head], state[family.embedding]):
        raise UserError(
            f"{family.head} differs from {family.embedding}, although config.json ties them: set "
            "tie_word_embeddings to false there"
        )
