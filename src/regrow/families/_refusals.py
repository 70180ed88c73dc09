"""Sizes that a model of a family cannot have."""

from __future__ import annotations

from typing import Any

from regrow.errors import UserError
from regrow.families._table import NAMED, Family


def check_sizes(
    family: Family, config: dict[str, Any], sizes: dict[str, int], multiple_of: int = 1
) -> None:
    """Raise UserError when a model of this config cannot be cut to `sizes`, in units.

    The rows of every changed dimension must be a multiple of `multiple_of`, as the target format
    asks.
    """
    before = family.sizes(config)
    after = {**before, **sizes}
    for dim, want in sizes.items():
        key = NAMED.get(dim, dim)
        _check_has(family, dim, want, config)
        if dim == "head_dim" and want != before[dim]:
            raise UserError(f"head_dim {want}: it cannot be cut; this model has {before[dim]}")
        if not 1 <= want <= before[dim]:
            raise UserError(f"{key} {want}: allowed are 1 to {before[dim]}, what the model has")
    _check_heads(before, after)
    _check_experts(family, config, after)
    for dim in ("hidden", "mlp", "expert_mlp", "heads", "vocab"):
        if dim in before and after[dim] != before[dim]:
            step = family.step(dim, config, multiple_of, **after)
            _check_width_multiple(dim, before[dim], after[dim], step)
    _check_loads(family, config, before, after)


def can_have(
    family: Family, config: dict[str, Any], sizes: dict[str, int], multiple_of: int = 1
) -> bool:
    """Whether `check_sizes` lets these sizes pass."""
    try:
        check_sizes(family, config, sizes, multiple_of)
    except UserError:
        return False
    return True


def _check_heads(before: dict[str, int], after: dict[str, int]) -> None:
    heads, kv_heads = after["heads"], after["kv_heads"]
    most = before["heads"] // before["kv_heads"]
    if heads % kv_heads or heads // kv_heads > most:
        allowed = ", ".join(str(kv_heads * n) for n in range(1, most + 1))
        raise UserError(
            f"{NAMED['heads']} {heads} with {kv_heads} key/value heads: each of "
            f"those has the same number of query heads, at most {most}; allowed: {allowed}"
        )


def _check_width_multiple(dim: str, before: int, after: int, step: int) -> None:
    if after % step == 0:
        return
    near = [n for n in (after - after % step, after - after % step + step) if 0 < n < before]
    advice = f"use {' or '.join(map(str, near))}" if near else f"leave it at {before}"
    raise UserError(
        f"{NAMED[dim]} {after}: in this model and for this target format it must be "
        f"a multiple of {step}; {advice}"
    )


def _check_has(family: Family, dim: str, want: int, config: dict[str, Any]) -> None:
    """Refuse to cut what no layer has: the MLP of a model whose MLPs are all in experts."""
    before = family.sizes(config).get(dim)
    if dim not in NAMED or dim in ("layers", "hidden", "vocab") or want == before:
        return
    if not family.layers_of(dim, config):
        other = {"mlp": "expert_mlp", "expert_mlp": "mlp"}.get(dim)
        hint = f": its MLP channels are {NAMED[other]}" if other else ""
        raise UserError(f"{NAMED[dim]} {want}: this {family.model_type} model has none{hint}")


def _check_experts(family: Family, config: dict[str, Any], after: dict[str, int]) -> None:
    """Refuse fewer experts than the router chooses for each token."""
    if "experts" in after:
        chosen = family.value(config, "num_experts_per_tok")
        if after["experts"] < chosen:
            raise UserError(
                f"num_experts {after['experts']}: the router chooses {chosen} for each token "
                f"(num_experts_per_tok); keep {chosen} or more"
            )


def _check_loads(
    family: Family, config: dict[str, Any], before: dict[str, int], after: dict[str, int]
) -> None:
    """Refuse what the stock config class refuses to load, even where head_dim is explicit."""
    hidden, heads = after["hidden"], after["heads"]
    if (
        family.heads_divide_hidden
        and hidden % heads
        and (hidden, heads)
        != (
            before["hidden"],
            before["heads"],
        )
    ):
        allowed = [n for n in range(1, before["heads"] + 1) if hidden % n == 0]
        fitting = ", ".join(str(n) for n in allowed if n % after["kv_heads"] == 0)
        raise UserError(
            f"num_attention_heads {heads} with hidden_size {hidden}: transformers loads a "
            f"{family.model_type} model only if hidden_size is a multiple of the heads; "
            f"use {fitting or 'another hidden_size'}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if family.rope_factors_follow_hidden and (factors := rope.get("short_factor")):
        part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        if int(hidden // heads * part) // 2 != len(factors):
            raise UserError(
                f"hidden_size {hidden} with {heads} heads: transformers loads a "
                f"{family.model_type} model with {len(factors)} long-RoPE factors only if "
                f"hidden_size / heads stays {before['hidden'] // before['heads']}; cut both "
                "alike or neither"
            )
