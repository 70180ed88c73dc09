"""Llama 1 to 3, SmolLM2, and the many models that call themselves llama."""

from __future__ import annotations

from regrow.families import Family, Tensor

FAMILY = Family(
    model_type="llama",
    gguf="llama",
    tensors={
        "model.embed_tokens.weight": Tensor(("vocab", "hidden")),
        "model.layers.{layer}.input_layernorm.weight": Tensor(("hidden",), norm=True),
        "model.layers.{layer}.self_attn.q_proj.weight": Tensor(("heads", "hidden")),
        "model.layers.{layer}.self_attn.q_proj.bias": Tensor(("heads",), when="attention_bias"),
        "model.layers.{layer}.self_attn.k_proj.weight": Tensor(("kv_heads", "hidden")),
        "model.layers.{layer}.self_attn.k_proj.bias": Tensor(("kv_heads",), when="attention_bias"),
        "model.layers.{layer}.self_attn.v_proj.weight": Tensor(("kv_heads", "hidden")),
        "model.layers.{layer}.self_attn.v_proj.bias": Tensor(("kv_heads",), when="attention_bias"),
        "model.layers.{layer}.self_attn.o_proj.weight": Tensor(("hidden", "heads")),
        "model.layers.{layer}.self_attn.o_proj.bias": Tensor(("hidden",), when="attention_bias"),
        "model.layers.{layer}.post_attention_layernorm.weight": Tensor(("hidden",), norm=True),
        "model.layers.{layer}.mlp.gate_proj.weight": Tensor(("mlp", "hidden")),
        "model.layers.{layer}.mlp.gate_proj.bias": Tensor(("mlp",), when="mlp_bias"),
        "model.layers.{layer}.mlp.up_proj.weight": Tensor(("mlp", "hidden")),
        "model.layers.{layer}.mlp.up_proj.bias": Tensor(("mlp",), when="mlp_bias"),
        "model.layers.{layer}.mlp.down_proj.weight": Tensor(("hidden", "mlp")),
        "model.layers.{layer}.mlp.down_proj.bias": Tensor(("hidden",), when="mlp_bias"),
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
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    heads_divide_hidden=True,
)
