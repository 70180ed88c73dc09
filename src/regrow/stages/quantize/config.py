"""What to quantize to, and how."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from regrow import plugins
from regrow.config import Config
from regrow.errors import unknown
from regrow.quantization import schemes

METHODS = "regrow.stages.quantize.methods"


class QuantizeConfig(Config):
    """Scheme, method, and what is left out."""

    scheme: str = "int4"
    """int8 (weights alone), int8-dynamic and fp8 (inputs too, scaled per token), int4-g32, int4-g64
    (= int4) or int4-g128 (that many weights to a scale), int4-…-asym (with zero points). A layer
    whose columns are no multiple of the group gets a smaller group, or int8 if none fits."""
    method: str = "gptq"
    """How weights are rounded: a name in quantize/methods."""
    keep: tuple[str, ...] = ("lm_head", "embed_tokens")
    """Modules left in 16 bits: regular expressions, searched in their names."""
    rules: dict[str, str] = Field(default_factory=dict)
    """Scheme by regular expression, for the modules whose name has it; the first that fits."""
    samples: int = Field(default=64, ge=8)
    """Calibration blocks; every eighth is not calibrated on but measured on."""
    damping: float = Field(default=0.01, gt=0)
    """For gptq: share of its mean diagonal that is added to the second-moment matrix."""
    dequantize: bool = False
    """Write the rounded weights as a plain checkpoint, which saves nothing: for stages that come
    after this one although it should be the last."""

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, scheme: str) -> str:
        return schemes.find(scheme).name

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        known = plugins.names(METHODS)
        if method not in known:
            raise unknown("method", method, known)
        return method

    @field_validator("keep")
    @classmethod
    def _patterns(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in keep:
            _check(pattern)
        return keep

    @field_validator("rules")
    @classmethod
    def _known_schemes(cls, rules: dict[str, str]) -> dict[str, str]:
        for pattern in rules:
            _check(pattern)
        return {pattern: schemes.find(name).name for pattern, name in rules.items()}


def _check(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
