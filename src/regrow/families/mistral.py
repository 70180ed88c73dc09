"""Mistral 7B and similar models: Llama's layout, no biases, one sliding window for all layers."""

from __future__ import annotations

from regrow.families import Family
from regrow.families._layout import attention, decoder, mlp

FAMILY = Family(
    model_type="mistral",
    gguf="llama",
    **decoder(attention(), mlp()),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
)
