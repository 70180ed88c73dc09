"""How much of a teacher to cache, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from regrow.config import Config

OPTIONS_OF = {"samples": ("draws", "sampling"), "topk": ("k", "bits"), "hidden": ("dtype",)}
"""What only one format reads."""


class CacheConfig(Config):
    """Budget and format of a cache."""

    tokens: int = Field(default=1_000_000, ge=1)
    """Tokens to train on that are cached; raising it later adds to a finished cache. In a recipe
    that leaves it out: what the distillations of this teacher take."""
    heldout_sequences: int = Field(default=16, ge=1)
    """Held-out blocks, always stored exactly; in a recipe as for tokens."""
    format: Literal["samples", "topk", "hidden"] = "samples"
    """samples: unbiased draws of ids. topk: the likeliest ids and the mass of the rest. hidden: the
    last hidden state, which is exact and serves every output loss."""
    k: int = Field(default=18, ge=1)
    """topk: how many ids."""
    bits: int = Field(default=8, ge=2, le=16)
    """topk: bits of a probability."""
    draws: int = Field(default=40, ge=1, le=255)
    """samples: draws for each token."""
    sampling: Literal["systematic", "multinomial"] = "systematic"
    """samples: evenly spaced in the cumulated distribution, or independent (more noise)."""
    dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """hidden: bfloat16 is exact, int8 half the size."""
    seed: int = 0
    """samples: seed of the draws."""

    @model_validator(mode="after")
    def _options_are_of_the_format(self) -> CacheConfig:
        for kind, names in OPTIONS_OF.items():
            for name in names:
                changed = getattr(self, name) != type(self).model_fields[name].default
                if kind != self.format and changed:
                    raise ValueError(
                        f"{name} is of format {kind}, this is {self.format}: give that format, or "
                        f"leave out {name}"
                    )
        return self
