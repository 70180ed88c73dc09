"""Llama 1 to 3, SmolLM2, and all other models whose model_type is llama."""

from __future__ import annotations

from regrow.families import Family
from regrow.families._layout import attention, decoder, mlp

FAMILY = Family(
    model_type="llama",
    gguf="llama",
    **decoder(attention("attention_bias", "attention_bias"), mlp("mlp_bias")),
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
