"""What llama.cpp cannot hold of a model, refused before any work; what it leaves out, told."""

from __future__ import annotations

from typing import Any

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.families import Family
from regrow.stages.export import rope

ACTIVATION = {"gemma3": "gelu_pytorch_tanh"}
"""By architecture; the others compute silu."""
NO_BIAS = ("qwen3", "qwen3moe", "gemma3")
"""Architectures without a bias in the attention's output."""


def check(checkpoint: Checkpoint, family: Family, config: Any) -> None:
    """Raise UserError, naming the reason, when llama.cpp cannot compute what this model does."""
    if family.gguf is None:
        raise UserError(
            f"llama.cpp knows no {family.model_type} models: there is nothing to export to"
        )
    arch, raw = family.gguf, checkpoint.config
    found = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
    wanted = ACTIVATION.get(arch, "silu")
    if arch == "gemma3":
        found = raw.get("hidden_activation") or wanted
    if found not in (wanted, {"silu": "swish"}.get(wanted)):
        raise UserError(f"activation {found!r}: llama.cpp's {arch} computes {wanted} only")
    if arch in NO_BIAS and raw.get("attention_bias"):
        raise UserError(f"attention_bias: llama.cpp's {arch} has none in the attention's output")
    rope.check(config, arch)
    {"phi3": _check_phi3, "qwen3moe": _check_qwen3moe, "gemma3": _check_gemma3}.get(
        arch, lambda *_: None
    )(family, raw, config)


def _check_phi3(family: Family, raw: dict[str, Any], config: Any) -> None:
    sizes = family.sizes(raw)
    if sizes["heads"] * sizes["head_dim"] != sizes["hidden"]:
        raise UserError(
            f"{sizes['heads']} heads of {sizes['head_dim']} with hidden_size {sizes['hidden']}: "
            "llama.cpp's phi3 holds heads × head_dim = hidden_size only; cut both alike or neither"
        )


def _check_qwen3moe(family: Family, raw: dict[str, Any], config: Any) -> None:
    dense = sorted(set(range(family.sizes(raw)["layers"])) - set(family.layers_of("experts", raw)))
    if dense:
        raise UserError(
            f"layer {dense[0]} has no experts: llama.cpp's qwen3moe has experts in every layer"
        )
    if not config.norm_topk_prob:
        raise UserError(
            "norm_topk_prob false: llama.cpp's qwen3moe normalizes what the router chose"
        )


def _check_gemma3(family: Family, raw: dict[str, Any], config: Any) -> None:
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if raw.get(key):
            raise UserError(f"{key} {raw[key]}: llama.cpp's gemma3 has none")
    sliding_period(config)


def sliding_period(config: Any) -> int:
    """n where every nth layer of a Gemma 3 has full attention, the others a sliding window.

    llama.cpp derives the layers' kinds from n alone; raises UserError when they are otherwise.
    """
    kinds = [kind == "full_attention" for kind in config.layer_types]
    for period in range(1, len(kinds) + 2):
        if kinds == [(layer + 1) % period == 0 for layer in range(len(kinds))]:
            return period
    full = [layer for layer, whole in enumerate(kinds) if whole]
    raise UserError(
        f"layers {full} of {len(kinds)} have full attention: llama.cpp derives that from a period "
        "(every nth layer), which these layers do not have; prune layers so that it stays"
    )


def context(config: Any, architecture: str) -> tuple[int, str]:
    """Positions up to which llama.cpp computes what transformers does, and why, if not all.

    llama.cpp has sliding windows for Gemma 3 only; within one window they make no difference.
    """
    most = int(config.max_position_embeddings)
    window = config.to_dict().get("sliding_window")
    kinds = config.to_dict().get("layer_types")
    slides = window and (kinds is None or "sliding_attention" in kinds)
    if architecture == "gemma3" or not slides or window >= most:
        return most, ""
    return int(window), (
        f"llama.cpp's {architecture} has no sliding window: context_length is set to the window, "
        f"{window} of {most} positions, up to which both compute the same"
    )
