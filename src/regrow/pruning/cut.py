"""Cut a model to a plan: in memory, from disk to disk, or one layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.checkpoint import checkpoint as checkpoints
from regrow.errors import UserError
from regrow.families import Family, Replace, as_on_disk, cut_tensor, new_name
from regrow.layerwise import LayerByLayer
from regrow.plan import Plan
from regrow.pruning.tokenizer import cut_ids, ids_named, read_rules, write_tokenizer


def check(plan: Plan, family: Family, config: dict[str, Any]) -> None:
    """Raise UserError when `plan` cannot be applied to a model of this family and config."""
    families.check_plan(plan, family, config)
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
    yield from families.cut(tensors, plan, family, config, replace)


def cut_config(config: dict[str, Any], plan: Plan, family: Family) -> dict[str, Any]:
    """The cut model's config.json: new widths, explicit head_dim, and only the kept layers."""
    new = families.cut_config(config, plan, family)
    return new if plan.vocab is None else cut_ids(new, plan.vocab)


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
    family = family or families.of_config(config)
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
    family = family or families.of_config(config)
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

    stock = checkpoint.stock_config()
    small = type(stock).from_dict(cut_config(config, plan, family))
    shared = like if plan.hidden is None and plan.vocab is None else None
    return LayerByLayer(
        family, small, parents, read, checkpoint.compute_dtype(device), device, like=shared
    )


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
