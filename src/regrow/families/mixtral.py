"""Mixtral: Mistral's attention, and a router with experts in every layer.

On disk each expert has its own tensors: w1 is the gate, w3 the up and w2 the down projection.
transformers stacks them in memory.
"""

from __future__ import annotations

from regrow.families import Family
from regrow.families._layout import attention, decoder, experts

EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}."

FAMILY = Family(
    model_type="mixtral",
    gguf="llama",
    **decoder(attention(), experts("block_sparse_moe", "w1", "w3", "w2")),
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
