"""What to export to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from regrow.config import Config
from regrow.quantization.gguf_types import known


class ExportConfig(Config):
    """The file's type, and how it is proven."""

    type: str = "Q8_0"
    """How weights are stored: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, or a mix of K-quants
    (Q6_K, Q5_K_M, Q5_K_S, Q4_K_M, Q4_K_S, Q3_K_L, Q3_K_M, Q3_K_S, Q2_K), for which llama.cpp is
    needed."""
    name: str | None = Field(default=None, min_length=1, pattern=r"^[^/\\]+$")
    """Name of the model, and of the file; by default that of the run or the folder."""
    pre: str | None = None
    """llama.cpp's name for how the tokenizer splits text, where it is not recognised."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Whether llama.cpp opens the file and is compared with transformers: auto does where it is
    installed."""
    verify_tokens: int = Field(default=512, ge=1)
    """Positions to compare on, at most: of held-out text of the data, else of a built-in text."""
    prompt: str = Field(default="The capital of France is", min_length=1)
    """What both continue greedily."""
    new_tokens: int = Field(default=24, ge=1)
    """Tokens of that continuation."""

    @field_validator("type")
    @classmethod
    def _known_type(cls, name: str) -> str:
        return known(name)
