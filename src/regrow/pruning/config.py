"""The config of a prune: the target, the criteria, and the repair."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from regrow.config import Config
from regrow.quantization import formats

SEARCH = "search_seconds"
"""The entry of a manifest with the seconds that the choice of a shape took."""
SIZES = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
    "experts": "num_experts",
    "expert_mlp": "moe_intermediate_size",
}
"""The config field of each dimension."""
TARGETS = ("keep_params", "max_bytes", "max_ram", "max_prefill_ms", "max_decode_ms")
"""The fields that set a target and leave the shape to a search."""
PLAIN = "bf16"
"""The format whose weights are not rounded."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def bytes_of(text: str) -> int:
    """The number of bytes in `90MB`, `1.5GiB` or `90000000`; raises ValueError for other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmg]i?)?b?\s*", str(text).lower())
    if match is None or float(match[1]) <= 0:
        raise ValueError("give a size such as 90MB, 1.5GiB or 90000000")
    return int(float(match[1]) * UNITS[match[2] or ""])


def _size(value: object) -> object:
    """Check a size and return it as text; YAML may parse it as a number."""
    if value is None:
        return None
    bytes_of(str(value))
    return str(value)


Size = Annotated[str, BeforeValidator(_size)]


class PruneConfig(Config):
    """A target for a shape search (several targets must all be met), or explicit sizes, or a plan
    from a file."""

    keep_params: float | None = Field(default=None, gt=0, lt=1)
    """Share of the parameters to keep, tied weights counted once; a search chooses the shape."""
    max_bytes: Size | None = None
    """Upper limit on the bytes of the model's tensors in `format`, such as 90MB or 1.5GiB."""
    max_ram: Size | None = None
    """Upper limit on the bytes of weights in `format`, KV cache and activations at `context_length`
    tokens."""
    max_prefill_ms: float | None = Field(default=None, gt=0)
    """Upper limit on the milliseconds to process a prompt of `prompt_tokens`, on this machine."""
    max_decode_ms: float | None = Field(default=None, gt=0)
    """Upper limit on the milliseconds per generated token after that prompt, on this machine."""
    format: str = "bf16"
    """Weight format for counting bytes: bf16, int8, int4-g128, q8_0, q4_0, q4_k_m, …."""
    formats: tuple[str, ...] = ()
    """Formats among which a search for max_bytes or max_ram chooses, in place of `format`: bf16,
    int8, int4-g32, int4-g64, int4-g128. Every candidate is scored with its weights rounded to the
    format. The whole model is a candidate in each format in which it meets the limits; if it is the
    best one, nothing is pruned, and a line says how to quantize it."""
    context_length: int = Field(default=2048, ge=1)
    """Number of tokens in the KV cache for max_ram."""
    prompt_tokens: int = Field(default=512, ge=1)
    """Number of prompt tokens for latency measurements."""
    num_candidates: int = Field(default=8, ge=1)
    """Shapes to try for a target: up to 8 from a fixed list, more from a grid of all dimensions."""
    halving_tokens: int = Field(default=0, ge=0)
    """Distil the best few shapes on this many tokens, the better half on twice as many, and so on;
    0 chooses without training."""
    halving_shapes: int = Field(default=4, ge=2)
    """Number of shapes in the first round of distillations."""
    num_layers: int | None = None
    """Number of layers to keep."""
    hidden_size: int | None = None
    """Number of channels of the residual stream to keep."""
    intermediate_size: int | None = None
    """Number of MLP channels to keep in every layer."""
    num_attention_heads: int | None = None
    """Number of query heads to keep in every layer, equally many for each key/value head."""
    num_key_value_heads: int | None = None
    """Number of key/value heads to keep in every layer."""
    vocab_size: int | None = None
    """Number of tokens to keep, by counts in the calibration text; the tokenizer is cut too."""
    num_experts: int | None = None
    """Number of experts to keep in every layer that has experts."""
    moe_intermediate_size: int | None = None
    """Number of channels to keep inside every expert."""
    plan: str | None = None
    """Path of a plan.json to apply, instead of choosing units by importance."""
    allow_sibling: bool = False
    """Apply a plan that was made for a sibling: another checkpoint of the same family and sizes,
    such as this model before or after fine-tuning."""
    multiple_of: int = Field(default=32, ge=1)
    """Changed widths are multiples of this (256 for K-quants, 64 or 128 for group int4): a search
    rounds to it, and a given size that is no multiple is refused."""
    criterion: str = "activation_l2"
    """Importance criterion for widths, one of the profile's criteria."""
    expert_criterion: str | None = None
    """Importance criterion for experts; None uses the criterion for widths."""
    layer_criterion: str = "block_influence"
    """Importance criterion for whole layers."""
    repair: bool = True
    """Re-solve projections in closed form, without training. The result is kept only if it brings
    the whole model closer to the dense model, on text of the profile that the repair did not
    read."""
    repair_method: str = "sequential"
    """sequential: one layer after another, by running the profile's text through the cut model;
    gram: all layers at once, from the profile's Gram matrices."""
    repair_tokens: int = Field(default=131072, ge=1)
    """Maximum number of tokens of the profile's text for a sequential repair."""
    repair_upstream: float = Field(default=1.0, ge=0, le=1)
    """Share of the error of earlier layers that a sequential repair corrects in each layer."""

    @field_validator("allow_sibling")
    @classmethod
    def _has_plan(cls, allow_sibling: bool, info: ValidationInfo) -> bool:
        if allow_sibling and info.data.get("plan") is None:
            raise ValueError(
                "it only applies to a plan from a file: give plan, or leave allow_sibling out"
            )
        return allow_sibling

    @field_validator("formats")
    @classmethod
    def _rounds_weights(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name != PLAIN and formats.find_scheme(name).dynamic:
                raise ValueError(f"{name} also rounds inputs: give bf16, int8 or a kind of int4")
        return names

    @model_validator(mode="after")
    def _has_bytes(self) -> PruneConfig:
        if self.formats and (self.timed or (self.max_bytes or self.max_ram) is None):
            raise ValueError(
                "formats are chosen under a limit of max_bytes or max_ram, without a limit in "
                "milliseconds: give one of these, or format instead of formats"
            )
        return self

    @property
    def timed(self) -> bool:
        """Whether the config limits a latency."""
        return self.max_prefill_ms is not None or self.max_decode_ms is not None

    @property
    def searches(self) -> bool:
        """Whether the config sets a target, so that the shape must be searched for."""
        return any(getattr(self, name) is not None for name in TARGETS)

    def sizes(self) -> dict[str, int]:
        """The explicit sizes, by dimension."""
        sizes = {dim: getattr(self, key) for dim, key in SIZES.items()}
        return {dim: size for dim, size in sizes.items() if size is not None}

    def with_sizes(self, sizes: dict[str, int], format: str) -> PruneConfig:
        """This config with explicit sizes by dimension, and a format, in place of its targets."""
        named: dict[str, object] = {SIZES[dim]: size for dim, size in sizes.items()}
        named |= {"halving_tokens": 0, "format": format, "formats": ()}
        return self.model_copy(update={**dict.fromkeys(TARGETS), **named})
