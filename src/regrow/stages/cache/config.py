"""Config of the cache stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from regrow.config import Config

OPTIONS_OF = {"samples": ("draws", "sampling"), "topk": ("k", "bits"), "hidden": ("dtype",)}
"""Fields that only one format reads."""


class CacheConfig(Config):
    """Size and format of a cache."""

    tokens: int = Field(default=1_000_000, ge=1)
    """Tokens to train on that are cached. Raising it later adds to a finished cache. When a recipe
    leaves it out, it is the number that the distillations of this teacher take."""
    heldout_sequences: int = Field(default=16, ge=1)
    """Held-out sequences, which are always stored exactly. When a recipe leaves it out, it is the
    number that the distillations of this teacher take."""
    format: Literal["samples", "topk", "hidden"] = "samples"
    """samples: unbiased draws of ids. topk: the likeliest ids and the mass of all others. hidden:
    the last hidden state, which is exact and serves every loss on the output."""
    k: int = Field(default=18, ge=1)
    """topk: number of ids."""
    bits: int = Field(default=8, ge=2, le=16)
    """topk: bits of a probability."""
    draws: int = Field(default=40, ge=1, le=255)
    """samples: number of draws for each token."""
    sampling: Literal["systematic", "multinomial"] = "systematic"
    """samples: evenly spaced in the cumulative distribution, or independent (more noise)."""
    dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """hidden: bfloat16 is exact, int8 takes half the space."""
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
