"""Table rows that many families share, in Llama's layout: attention, MLP, experts, norms, head.

FAMILY = Family(model_type="mistral", **decoder(attention(), mlp()), defaults={...})
"""

from __future__ import annotations

from typing import Any

from regrow.families._rows import LayerKind, Tensor

Rows = dict[str, Tensor]
"""Rows of a layer, by their names inside the layer: `mlp.down_proj.weight`."""
Bias = bool | str
"""Whether projections have a bias, or the config key that decides it."""

LAYER = "model.layers.{layer}."


def attention(
    qkv_bias: Bias = False, out_bias: Bias = False, qk_norm: bool = False, fused: bool = False
) -> Rows:
    """Rows of attention; `qk_norm`: norms over each head, `fused`: q, k, v in one tensor."""
    if fused:
        rows = _projection("qkv_proj", (("heads", "kv_heads", "kv_heads"), "hidden"), qkv_bias)
    else:
        rows = _projection("q_proj", ("heads", "hidden"), qkv_bias)
        rows |= _projection("k_proj", ("kv_heads", "hidden"), qkv_bias)
        rows |= _projection("v_proj", ("kv_heads", "hidden"), qkv_bias)
    if qk_norm:
        rows |= {f"{name}_norm.weight": Tensor(("head_dim",)) for name in "qk"}
    rows |= _projection("o_proj", ("hidden", "heads"), out_bias)
    return {f"self_attn.{name}": row for name, row in rows.items()}


def mlp(bias: Bias = False, fused: bool = False, layers: LayerKind | None = None) -> Rows:
    """Rows of a gated MLP; `fused`: gate and up in one tensor."""
    if fused:
        rows = _projection("gate_up_proj", (("mlp", "mlp"), "hidden"), bias, layers)
    else:
        rows = _projection("gate_proj", ("mlp", "hidden"), bias, layers)
        rows |= _projection("up_proj", ("mlp", "hidden"), bias, layers)
    rows |= _projection("down_proj", ("hidden", "mlp"), bias, layers)
    return {f"mlp.{name}": row for name, row in rows.items()}


def experts(
    module: str = "mlp",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    layers: LayerKind | None = None,
) -> Rows:
    """Rows of a router and its experts; the arguments are the names of the projections on disk."""
    inside = f"{module}.experts.{{expert}}."
    return {
        f"{module}.gate.weight": Tensor(("experts", "hidden"), layers=layers),
        f"{inside}{gate}.weight": Tensor(("expert_mlp", "hidden"), layers=layers),
        f"{inside}{up}.weight": Tensor(("expert_mlp", "hidden"), layers=layers),
        f"{inside}{down}.weight": Tensor(("hidden", "expert_mlp"), layers=layers),
    }


def decoder(attention: Rows, mlp: Rows, post_norms: bool = False) -> dict[str, Any]:
    """The fields tensors, observe, residual and post_norm of a family with these layers.

    With `post_norms`, attention and MLP also have a norm after them, before the sum with the
    residual stream (Gemma).
    """
    before_mlp = "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm"
    norm = Tensor(("hidden",), norm=True)
    rows = {"input_layernorm.weight": norm, **attention}
    rows |= {"post_attention_layernorm.weight": norm, f"{before_mlp}.weight": norm, **mlp}
    if post_norms:
        rows["post_feedforward_layernorm.weight"] = norm
    observe: dict[str, tuple[str, ...]] = {}
    if any(row.has("mlp") for row in mlp.values()):
        observe["mlp"] = (LAYER + "mlp.down_proj",)
    observe["heads"] = (LAYER + "self_attn.o_proj",)
    if any(row.has("experts") for row in mlp.values()):
        observe["experts"] = (LAYER + "mlp.experts",)
    observe["hidden"] = (LAYER + "input_layernorm", LAYER + before_mlp, "model.norm")
    after = {"mlp": "post_feedforward_layernorm", "heads": "post_attention_layernorm"}
    return {
        "tensors": {
            "model.embed_tokens.weight": Tensor(("vocab", "hidden")),
            **{LAYER + name: row for name, row in rows.items()},
            "model.norm.weight": norm,
            "lm_head.weight": Tensor(("vocab", "hidden"), when="!tie_word_embeddings"),
        },
        "observe": observe,
        "residual": {"mlp": LAYER + before_mlp, "heads": LAYER + "input_layernorm"},
        "post_norm": {dim: LAYER + name for dim, name in after.items()} if post_norms else {},
    }


def _projection(
    name: str,
    axes: tuple[str | tuple[str, ...], ...],
    bias: Bias,
    layers: LayerKind | None = None,
) -> Rows:
    rows = {f"{name}.weight": Tensor(axes, layers=layers)}
    if bias:
        when = bias if isinstance(bias, str) else None
        rows[f"{name}.bias"] = Tensor(axes[:1], when=when, layers=layers)
    return rows
