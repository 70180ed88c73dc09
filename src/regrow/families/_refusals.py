"""Sizes that a model of a family cannot have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from regrow.errors import UserError
from regrow.families._table import NAMED, Family

Sizes = dict[str, int]
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
STATE_SPACE_KEY = re.compile(r"(mamba|ssm|rwkv)_")


def check_sizes(family: Family, config: dict[str, Any], sizes: Sizes, multiple_of: int = 1) -> None:
    """Raise UserError when a model of this config cannot be cut to `sizes`, in units.

    The rows of every changed dimension must be a multiple of `multiple_of` (for quantization).
    """
    before = family.sizes(config)
    after = {**before, **sizes}
    for dim, size in sizes.items():
        if dim in family.refused and size != before[dim]:
            raise UserError(
                f"{NAMED.get(dim, dim)} {size}: it cannot be cut in this {family.model_type} "
                f"model: {family.refused[dim]}"
            )
        _check_has(family, dim, size, config)
        if dim == "head_dim" and size != before[dim]:
            raise UserError(f"head_dim {size}: it cannot be cut; this model has {before[dim]}")
        if not 1 <= size <= before[dim]:
            raise UserError(f"{NAMED.get(dim, dim)} {size}: allowed are 1 to {before[dim]}")
    _check_experts(family, config, after)
    model = (family, config, multiple_of)
    if _group_problem(before, after) is not None:
        raise _heads_error(*model, before, after)
    for dim in ("hidden", "mlp", "expert_mlp", "vocab"):
        if dim in before and after[dim] != before[dim]:
            multiple = family.step(dim, config, multiple_of, **after)
            _check_width_multiple(dim, before[dim], after[dim], multiple)
    if _heads_problem(*model, before, after) is not None:
        raise _heads_error(*model, before, after)


def check_layers(config: dict[str, Any], place: Path) -> None:
    """Raise UserError for other layers than attention in a config of a family without them."""
    other = sorted(set(config.get("layer_types") or []) - ATTENTION_LAYERS)
    state_space = [key for key in config if STATE_SPACE_KEY.match(key)]
    if other or state_space:
        raise UserError(
            f"{place} is a hybrid model ({(other + state_space)[0]}): only attention layers are "
            f"supported in {config['model_type']} models, state-space and linear-attention layers "
            "are not"
        )


def can_have(family: Family, config: dict[str, Any], sizes: Sizes, multiple_of: int = 1) -> bool:
    """Whether `check_sizes` accepts these sizes."""
    try:
        check_sizes(family, config, sizes, multiple_of)
    except UserError:
        return False
    return True


def _check_has(family: Family, dim: str, size: int, config: dict[str, Any]) -> None:
    """Refuse to cut a dimension that no layer has, such as the MLP when all layers have experts."""
    before = family.sizes(config).get(dim)
    if dim not in NAMED or dim in ("layers", "hidden", "vocab") or size == before:
        return
    if not family.layers_of(dim, config):
        other = {"mlp": "expert_mlp", "expert_mlp": "mlp"}.get(dim)
        hint = f": its MLP channels are {NAMED[other]}" if other else ""
        raise UserError(f"{NAMED[dim]} {size}: this {family.model_type} model has none{hint}")


def _check_experts(family: Family, config: dict[str, Any], after: Sizes) -> None:
    """Refuse fewer experts than the router chooses for each token."""
    if "experts" in after:
        chosen = family.value(config, "num_experts_per_tok")
        if after["experts"] < chosen:
            raise UserError(
                f"num_experts {after['experts']}: the router chooses {chosen} for each token "
                f"(num_experts_per_tok); keep {chosen} or more"
            )


def _check_width_multiple(dim: str, before: int, after: int, multiple: int) -> None:
    if after % multiple == 0:
        return
    lower = after - after % multiple
    near = [n for n in (lower, lower + multiple) if 0 < n < before]
    advice = f"use {' or '.join(map(str, near))}" if near else f"leave it at {before}"
    raise UserError(
        f"{NAMED[dim]} {after}: in this model and for this target format it must be "
        f"a multiple of {multiple}; {advice}"
    )


def _group_problem(before: Sizes, after: Sizes) -> str | None:
    """Why the query heads cannot be shared among the key/value heads; None when they can."""
    heads, kv_heads = after["heads"], after["kv_heads"]
    most = before["heads"] // before["kv_heads"]
    if heads % kv_heads or heads // kv_heads > most:
        return f"each of those has the same number of query heads, at most {most}"
    return None


def _heads_problem(
    family: Family, config: dict[str, Any], multiple_of: int, before: Sizes, after: Sizes
) -> str | None:
    """Why a model cannot have these heads with this hidden size; None when it can.

    transformers may refuse to load a model even if its head_dim is explicit.
    """
    heads, hidden = after["heads"], after["hidden"]
    if problem := _group_problem(before, after):
        return problem
    multiple = family.step("heads", config, multiple_of, **after)
    if heads != before["heads"] and heads % multiple:
        return (
            "in this model and for this target format the number of query heads must be a "
            f"multiple of {multiple}"
        )
    if (heads, hidden) == (before["heads"], before["hidden"]):
        return None
    loads = f"transformers loads a {family.model_type} model"
    if family.heads_divide_hidden and hidden % heads:
        return f"{loads} only if hidden_size, here {hidden}, is a multiple of them"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if family.rope_factors_follow_hidden and (factors := rope.get("short_factor")):
        part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        if int(hidden // heads * part) // 2 != len(factors):
            width = before["hidden"] // before["heads"]
            return (
                f"{loads} with {len(factors)} long-RoPE factors only if hidden_size / heads "
                f"stays {width}, and here it is {hidden // heads}"
            )
    return None


def _heads_error(
    family: Family, config: dict[str, Any], multiple_of: int, before: Sizes, after: Sizes
) -> UserError:
    """The error for these heads; it names the size that was changed and suggests legal sizes."""

    def legal(dim: str, per_unit: int = 0) -> list[int]:
        sizes = [
            {**after, dim: n, **({"heads": n * per_unit} if per_unit else {})}
            for n in range(1, before[dim] + 1)
        ]
        model = (family, config, multiple_of, before)
        return [size[dim] for size in sizes if _heads_problem(*model, size) is None]

    heads, kv_heads, hidden = after["heads"], after["kv_heads"], after["hidden"]
    problem = _heads_problem(family, config, multiple_of, before, after)
    group = before["heads"] // before["kv_heads"]
    if heads == before["heads"] and kv_heads == before["kv_heads"]:
        advice = f"leave it at {before['hidden']}, or change the heads with it"
        return UserError(f"hidden_size {hidden} with {heads} heads: {problem}; {advice}")
    options = legal("heads")
    if heads == group * kv_heads != before["heads"]:  # as many as a cut of only KV heads leaves
        advice = _advice(legal("kv_heads", group), before["kv_heads"])
        if options:
            advice += f", or give num_attention_heads {' or '.join(map(str, options))} with it"
        subject = f"num_key_value_heads {kv_heads} with {heads} query heads"
        return UserError(f"{subject}: {problem}; {advice}")
    subject = f"num_attention_heads {heads} with {kv_heads} key/value heads"
    if _group_problem(before, after) is not None and options:
        return UserError(f"{subject}: {problem}; allowed: {', '.join(map(str, options))}")
    return UserError(f"{subject}: {problem}; {_advice(options, before['heads'])}")


def _advice(options: list[int], before: int) -> str:
    if not options:
        return "no number of heads fits: change hidden_size or multiple_of"
    if options == [before]:
        return f"leave it at {before}"
    return f"use {' or '.join(map(str, options))}"
