"""Config of the generate stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regrow.config import Config


class GenerateConfig(Config):
    """Which prompts are answered, and how tokens are drawn."""

    limit: int | None = Field(default=None, ge=1)
    """Answer only the first prompts, as many as this; all when None."""
    split: Literal["train", "calibration", "heldout", "all"] = "train"
    """Which prompts to answer: train leaves out those whose rows are kept for measuring."""
    max_new_tokens: int = Field(default=256, ge=1)
    """The most tokens that an answer may have."""
    keep_unfinished: bool = False
    """Also write answers that max_new_tokens cut off. A student learns to stop in mid-sentence."""
    greedy: bool = False
    """Take the likeliest token instead of drawing one."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The logits are divided by this before a draw."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the fewest likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the draws; they do not depend on the batch that a prompt is in."""
