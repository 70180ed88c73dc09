"""Gemma 3 (text): norms before and after attention and MLP, stored as weight - 1; scaled embedding.

q_norm and k_norm use the same rms_norm_eps as the norms over hidden. A cut of hidden changes it for
them too, which is harmless as long as eps is far below the mean square of a head.
"""

from __future__ import annotations

from regrow.families import Family
from regrow.families._layout import attention, decoder, mlp

FAMILY = Family(
    model_type="gemma3_text",
    gguf="gemma3",
    **decoder(attention("attention_bias", "attention_bias", qk_norm=True), mlp(), post_norms=True),
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
    },
    norm_offset=1.0,
    scaled_embedding=True,
    sliding_period=("sliding_window_pattern", 6),
    heads_divide_hidden=True,
)
