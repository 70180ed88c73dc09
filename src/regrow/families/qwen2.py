"""Qwen 2 and 2.5: Llama's layout with biases on q, k and v."""

from __future__ import annotations

from regrow.families import Family
from regrow.families._layout import attention, decoder, mlp

FAMILY = Family(
    model_type="qwen2",
    gguf="qwen2",
    **decoder(attention(qkv_bias=True), mlp()),
    defaults={
        "num_key_value_heads": 32,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
)
