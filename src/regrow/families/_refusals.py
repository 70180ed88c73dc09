"""Sizes that a model of a family cannot have, beside those that are no multiple of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regrow.errors import UserError
from regrow.families._rows import NAMED

if TYPE_CHECKING:
    from regrow.families._table import Family


def check_has(family: Family, dim: str, want: int, config: dict[str, Any]) -> None:
    """Refuse to cut what no layer has: the MLP of a model whose MLPs are all in experts."""
    before = family.sizes(config).get(dim)
    if dim not in NAMED or dim in ("layers", "hidden", "vocab") or want == before:
        return
    if not family.layers_of(dim, config):
        other = {"mlp": "expert_mlp", "expert_mlp": "mlp"}.get(dim)
        hint = f": its MLP channels are {NAMED[other]}" if other else ""
        raise UserError(f"{NAMED[dim]} {want}: this {family.model_type} model has none{hint}")


def check_experts(family: Family, config: dict[str, Any], after: dict[str, int]) -> None:
    """Refuse fewer experts than the router chooses for each token."""
    if "experts" in after:
        chosen = family.value(config, "num_experts_per_tok")
        if after["experts"] < chosen:
            raise UserError(
                f"num_experts {after['experts']}: the router chooses {chosen} for each token "
                f"(num_experts_per_tok); keep {chosen} or more"
            )


def check_loads(
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
