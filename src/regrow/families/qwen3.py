"""Qwen 3: no fixed biases, RMSNorm on each query and key head.

q_norm and k_norm use the same rms_norm_eps as the norms over hidden. A cut of hidden changes it for
them too, which is harmless as long as eps is far below the mean square of a head.
"""

from __future__ import annotations

from regrow.families import Family
from regrow.families._layout import attention, decoder, mlp

FAMILY = Family(
    model_type="qwen3",
    gguf="qwen3",
    **decoder(attention("attention_bias", "attention_bias", qk_norm=True), mlp()),
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
)
