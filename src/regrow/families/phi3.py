"""Phi-3, Phi-3.5 and Phi-4 (dense): q, k, v fused into one tensor, gate and up into another."""

from __future__ import annotations

from regrow.families import Family, Tensor

FAMILY = Family(
    model_type="phi3",
    gguf="phi3",
    tensors={
        "model.embed_tokens.weight": Tensor(("vocab", "hidden")),
        "model.layers.{layer}.input_layernorm.weight": Tensor(("hidden",), norm=True),
        "model.layers.{layer}.self_attn.qkv_proj.weight": Tensor(
            (("heads", "kv_heads", "kv_heads"), "hidden")
        ),
        "model.layers.{layer}.self_attn.o_proj.weight": Tensor(("hidden", "heads")),
        "model.layers.{layer}.post_attention_layernorm.weight": Tensor(("hidden",), norm=True),
        "model.layers.{layer}.mlp.gate_up_proj.weight": Tensor((("mlp", "mlp"), "hidden")),
        "model.layers.{layer}.mlp.down_proj.weight": Tensor(("hidden", "mlp")),
        "model.norm.weight": Tensor(("hidden",), norm=True),
        "lm_head.weight": Tensor(("vocab", "hidden"), when="!tie_word_embeddings"),
    },
    observe={
        "mlp": ("model.layers.{layer}.mlp.down_proj",),
        "heads": ("model.layers.{layer}.self_attn.o_proj",),
        "hidden": (
            "model.layers.{layer}.input_layernorm",
            "model.layers.{layer}.post_attention_layernorm",
            "model.norm",
        ),
    },
    residual={
        "mlp": "model.layers.{layer}.post_attention_layernorm",
        "heads": "model.layers.{layer}.input_layernorm",
    },
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    rope_factors_follow_hidden=True,
)
