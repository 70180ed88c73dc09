"""Qwen 3 mixtures of experts: Qwen 3's attention; experts in all layers or in some.

On disk each expert has its tensors; transformers stacks them in memory. q_norm and k_norm share
rms_norm_eps with the norms over hidden: a cut of hidden changes it for them too, which is harmless
while eps is far below the mean square of a head.
"""

from __future__ import annotations

from regrow.families import Family, Tensor

EXPERT = "model.layers.{layer}.mlp.experts.{expert}."

FAMILY = Family(
    model_type="qwen3_moe",
    gguf="qwen3moe",
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
        "model.layers.{layer}.mlp.gate_proj.weight": Tensor(("mlp", "hidden"), layers="dense"),
        "model.layers.{layer}.mlp.up_proj.weight": Tensor(("mlp", "hidden"), layers="dense"),
        "model.layers.{layer}.mlp.down_proj.weight": Tensor(("hidden", "mlp"), layers="dense"),
        "model.layers.{layer}.mlp.gate.weight": Tensor(("experts", "hidden"), layers="sparse"),
        EXPERT + "gate_proj.weight": Tensor(("expert_mlp", "hidden"), layers="sparse"),
        EXPERT + "up_proj.weight": Tensor(("expert_mlp", "hidden"), layers="sparse"),
        EXPERT + "down_proj.weight": Tensor(("hidden", "expert_mlp"), layers="sparse"),
        "model.norm.weight": Tensor(("hidden",), norm=True),
        "lm_head.weight": Tensor(("vocab", "hidden"), when="!tie_word_embeddings"),
    },
    memory={
        "model.layers.{layer}.mlp.experts.gate_up_proj": (
            EXPERT + "gate_proj.weight",
            EXPERT + "up_proj.weight",
        ),
        "model.layers.{layer}.mlp.experts.down_proj": (EXPERT + "down_proj.weight",),
    },
    observe={
        "mlp": ("model.layers.{layer}.mlp.down_proj",),
        "heads": ("model.layers.{layer}.self_attn.o_proj",),
        "experts": ("model.layers.{layer}.mlp.experts",),
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
        "num_key_value_heads": 4,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "num_experts_per_tok": 8,
        "mlp_only_layers": None,
        "decoder_sparse_step": 1,
    },
    config_keys={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "mlp": "intermediate_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "vocab": "vocab_size",
        "experts": "num_experts",
        "expert_mlp": "moe_intermediate_size",
    },
    aliases={"num_experts": "num_local_experts"},
    dense_layers=("mlp_only_layers", "decoder_sparse_step"),
)
