"""What a profile gathers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regrow.config import Config


class ProfileConfig(Config):
    """What to measure on how much calibration text."""

    criteria: tuple[str, ...] = ("activation_l2", "block_influence", "token_count")
    """Importance criteria to score by: names of files in profile/importance."""
    samples: int = Field(default=1024, ge=1)
    """Calibration blocks to run through the model."""
    gram_tokens: int = Field(default=65536, ge=0)
    """Calibration tokens for the Gram matrices that repair needs; 0 gathers none."""
    grams: tuple[Literal["mlp", "heads"], ...] = ("mlp", "heads")
    """Dimensions whose readers' Gram matrices are gathered: those that will be cut."""
    token_weight: Literal["inverse_residual", "uniform"] = "inverse_residual"
    """Weight of a token in the Gram matrices: 1/|residual| (the error that matters after the next
    norm) or the same for all."""
    vocab_tokens: int = Field(default=2_000_000, ge=1)
    """Calibration tokens to count for the vocabulary (token_count): to the end of the split at
    most; they are tokenized, and not run through the model."""
    removal_sequences: int = Field(default=4, ge=1)
    """Blocks on which layers are removed in turn (kl_drop, perplexity_drop)."""
    seed: int = 0
    """Seed of the random criterion."""
