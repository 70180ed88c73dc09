"""Qwen 3 mixtures of experts: Qwen 3's attention; experts in all layers or in some.

On disk each expert has its own tensors; transformers stacks them in memory. q_norm and k_norm use
the same rms_norm_eps as the norms over hidden. A cut of hidden changes it for them too, which is
harmless as long as eps is far below the mean square of a head.
"""

from __future__ import annotations

from regrow.families import Family
from regrow.families._layout import attention, decoder, experts, mlp

EXPERT = "model.layers.{layer}.mlp.experts.{expert}."

FAMILY = Family(
    model_type="qwen3_moe",
    gguf="qwen3moe",
    **decoder(
        attention("attention_bias", "attention_bias", qk_norm=True),
        {**mlp(layers="dense"), **experts(layers="sparse")},
    ),
    memory={
        "model.layers.{layer}.mlp.experts.gate_up_proj": (
            EXPERT + "gate_proj.weight",
            EXPERT + "up_proj.weight",
        ),
        "model.layers.{layer}.mlp.experts.down_proj": (EXPERT + "down_proj.weight",),
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
