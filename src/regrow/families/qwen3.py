"""Qwen 3: no fixed biases, RMSNorm on each query and key head.

q_norm and k_norm share rms_norm_eps with the norms over hidden: a cut of hidden changes it for them
too, which is harmless while eps is far below the mean square of a head.
"""

from __future__ import annotations

from regrow.families import Family, Tensor

FAMILY = Family(
    model_type="qwen3",
    gguf="qwen3",
    tensors={
        "model.embed_tokens.weight": Tensor(("vocab", "hidden")),
        "model.layers.{layer}.input_layernorm.weight": Tensor(("hidden",), norm=True),
        "model.layers.{layer}.self_attn.q_proj.weight": Tensor(("heads", "hidden")),
        "model.layers.{layer}.self_attn.q_proj.bias": Tensor(("heads",), when="attention_bias"),
        "model.layers.{layer}.self_attn.k_proj.weight": Tensor(("kv_heads", "hidden")),
        "model.layers.{layer}.self_attn.k_proj.bias": Tensor(("kv_heads",), when="attention_bias"),
        "model.layers.{layer}.self_attn.v_proj.weight": Tensor(("kv_heads", "hidden")),
        "model.layers.{layer}.self_attn.v_proj.bias": Tensor(("kv_heads",), when="attention_bias"),
        "model.layers.{layer}.self_attn.q_norm.weight": Tensor(("head_dim",)),
        "model.layers.{layer}.self_attn.k_norm.weight": Tensor(("head_dim",)),
        "model.layers.{layer}.self_attn.o_proj.weight": Tensor(("hidden", "heads")),
        "model.layers.{layer}.self_attn.o_proj.bias": Tensor(("hidden",), when="attention_bias"),
        "model.layers.{layer}.post_attention_layernorm.weight": Tensor(("hidden",), norm=True),
        "model.layers.{layer}.mlp.gate_proj.weight": Tensor(("mlp", "hidden")),
        "model.layers.{layer}.mlp.up_proj.weight": Tensor(("mlp", "hidden")),
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
        "num_key_value_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
)
