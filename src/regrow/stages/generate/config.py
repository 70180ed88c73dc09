"""Which prompts are answered, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regrow.config import Config


class GenerateConfig(Config):
    """Choice of prompts and of tokens."""

    limit: int | None = Field(default=None, ge=1)
    """Answer so many prompts, the first; all when None."""
    split: Literal["train", "calibration", "heldout", "all"] = "train"
    """Which prompts: train leaves out those whose rows are kept for measuring."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer, at most."""
    keep_unfinished: bool = False
    """Write answers that were cut off by max_new_tokens too: a student learns to stop there."""
    greedy: bool = False
    """Always the likeliest token, instead of a draw."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The logits are divided by it before a draw."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the draws; each prompt has draws of its own, in whatever batch it stands."""
