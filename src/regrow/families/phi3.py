"""Phi-3, Phi-3.5 and Phi-4 (dense): q, k, v fused into one tensor, gate and up into another."""

from __future__ import annotations

from regrow.families import Family
from regrow.families._layout import attention, decoder, mlp

FAMILY = Family(
    model_type="phi3",
    gguf="phi3",
    **decoder(attention(fused=True), mlp(fused=True)),
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    rope_factors_follow_hidden=True,
)
