"""Mixtral: Mistral's attention, and in every layer experts that a router chooses among.

On disk each expert has its tensors, w1 the gate, w3 the up and w2 the down projection; transformers
stacks them in memory.
"""

from __future__ import annotations

from regrow.families import Family, Tensor

EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}."

FAMILY = Family(
    model_type="mixtral",
    gguf="llama",
    tensors={
        "model.embed_tokens.weight": Tensor(("vocab", "hidden")),
        "model.layers.{layer}.input_layernorm.weight": Tensor(("hidden",), norm=True),
        "model.layers.{layer}.self_attn.q_proj.weight": Tensor(("heads", "hidden")),
        "model.layers.{layer}.self_attn.k_proj.weight": Tensor(("kv_heads", "hidden")),
        "model.layers.{layer}.self_attn.v_proj.weight": Tensor(("kv_heads", "hidden")),
        "model.layers.{layer}.self_attn.o_proj.weight": Tensor(("hidden", "heads")),
        "model.layers.{layer}.post_attention_layernorm.weight": Tensor(("hidden",), norm=True),
        "model.layers.{layer}.block_sparse_moe.gate.weight": Tensor(("experts", "hidden")),
        EXPERT + "w1.weight": Tensor(("expert_mlp", "hidden")),
        EXPERT + "w3.weight": Tensor(("expert_mlp", "hidden")),
        EXPERT + "w2.weight": Tensor(("hidden", "expert_mlp")),
        "model.norm.weight": Tensor(("hidden",), norm=True),
        "lm_head.weight": Tensor(("vocab", "hidden"), when="!tie_word_embeddings"),
    },
    memory={
        "model.layers.{layer}.mlp.gate.weight": (
            "model.layers.{layer}.block_sparse_moe.gate.weight",
        ),
        "model.layers.{layer}.mlp.experts.gate_up_proj": (
            EXPERT + "w1.weight",
            EXPERT + "w3.weight",
        ),
        "model.layers.{layer}.mlp.experts.down_proj": (EXPERT + "w2.weight",),
    },
    observe={
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
        "num_key_value_heads": 8,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "num_experts_per_tok": 2,
    },
    config_keys={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "vocab": "vocab_size",
        "experts": "num_local_experts",
        "expert_mlp": "intermediate_size",
    },
)
