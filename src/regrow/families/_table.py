"""What a row and a table of a family are, and what follows from them: shapes, counts, legal sizes.

The dimensions of a decoder, counted in units:

    layers    decoder layers; never an axis, but the {layer} in a tensor's name
    hidden    channels of the residual stream
    mlp       channels inside an MLP
    heads     query heads, `head_dim` rows of a tensor each
    kv_heads  key/value heads, `head_dim` rows of a tensor each
    vocab     token ids
    head_dim  channels of one head; stays as it is
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from regrow.errors import UserError

CONFIG_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
}
PER_LAYER: dict[str, Literal["each", "ids", "count"]] = {
    "layer_types": "each",
    "no_rope_layers": "each",
    "mlp_only_layers": "ids",
    "max_window_layers": "count",
}


@dataclass(frozen=True)
class Tensor:
    """One row of a table: the dimension behind each axis of a tensor."""

    axes: tuple[str | tuple[str, ...], ...]
    """Per axis its dimension, or the dimensions of its fused parts in order."""
    when: str | None = None
    """Config key that must be true for the tensor to exist; "!key" for one that must be false."""
    norm: bool = False
    """Whether it is the weight of an RMSNorm over `hidden`, which averages over fewer channels
    after a cut and takes the factor sqrt(old / new)."""


@dataclass(frozen=True)
class Family:
    """A model family: its tensors by the names they have on disk, and what reads their axes."""

    model_type: str
    """`model_type` in config.json, and the name of the file."""
    tensors: dict[str, Tensor]
    """Every tensor a checkpoint can hold, by its name with {layer} for the layer's number."""
    observe: dict[str, tuple[str, ...]]
    """Per dimension the modules to watch: their input for mlp and heads, for hidden the output."""
    residual: dict[str, str]
    """Per dimension the module whose input is the stream that the block's output is added to."""
    post_norm: dict[str, str] = field(default_factory=dict, kw_only=True)
    """Per dimension the norm between the block's last projection and the stream, if any."""
    defaults: dict[str, Any]
    """Values that transformers takes for config keys a config.json may lack (None: derived)."""
    norm_offset: float = 0.0
    """What the model adds to a stored norm weight (Gemma: 1)."""
    scaled_embedding: bool = False
    """Whether the model multiplies its embedding by sqrt(hidden_size) (Gemma)."""
    config_keys: dict[str, str] = field(default_factory=lambda: dict(CONFIG_KEYS))
    """Config key behind each dimension."""
    per_layer_config: Mapping[str, Literal["each", "ids", "count"]] = field(
        default_factory=lambda: dict(PER_LAYER)
    )
    """Config keys that follow the kept layers: a list with an entry for each, a list of layer ids,
    or a count of the first layers."""
    sliding_period: tuple[str, int] | None = None
    """Config key and default of the period n where every nth layer has full attention, the others
    a sliding window, when the config lists no layer_types."""
    heads_divide_hidden: bool = False
    """Whether transformers refuses a hidden_size that is no multiple of the number of heads."""
    rope_factors_follow_hidden: bool = False
    """Whether transformers checks the length of long-RoPE factors against hidden_size / heads."""
    embedding: str = "model.embed_tokens.weight"
    """Name of the token embedding [vocab, hidden]."""
    final_norm: str = "model.norm.weight"
    """Name of the norm before the head."""
    head: str = "lm_head.weight"
    """Name of the head [vocab, hidden]; absent when tied to the embedding."""

    def value(self, config: dict[str, Any], key: str) -> Any:
        """`config[key]`, or what transformers takes when config.json lacks it.

        Raises UserError when there is no default.
        """
        if key in config:
            return config[key]
        if key not in self.defaults:
            raise UserError(f"config.json of this {self.model_type} model lacks {key}: add it")
        return self.defaults[key]

    def sizes(self, config: dict[str, Any]) -> dict[str, int]:
        """Units per dimension, and head_dim in rows, as transformers reads them from a config.

        Raises UserError when config.json lacks a size.
        """
        raw = {dim: self.value(config, key) for dim, key in self.config_keys.items()}
        if raw["kv_heads"] is None:
            raw["kv_heads"] = raw["heads"]
        raw["head_dim"] = self.value(config, "head_dim") or raw["hidden"] // raw["heads"]
        return {dim: int(size) for dim, size in raw.items()}

    def exists(self, row: Tensor, config: dict[str, Any]) -> bool:
        """Whether a checkpoint with this config holds the row's tensor."""
        if row.when is None:
            return True
        wanted = not row.when.startswith("!")
        return bool(self.value(config, row.when.removeprefix("!"))) == wanted

    def expected(
        self, config: dict[str, Any], sizes: dict[str, int] | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint; `sizes` override those of the config."""
        full = {**self.sizes(config), **(sizes or {})}
        shapes = {}
        for template, row in self.tensors.items():
            if self.exists(row, config):
                shape = tuple(rows(axis, full) for axis in row.axes)
                for layer in range(full["layers"] if "{layer}" in template else 1):
                    shapes[template.replace("{layer}", str(layer))] = shape
        return shapes

    def count(self, config: dict[str, Any], sizes: dict[str, int] | None = None) -> int:
        """Parameters of a model, tied weights once; `sizes` override those of the config."""
        full = {**self.sizes(config), **(sizes or {})}
        total = 0
        for template, row in self.tensors.items():
            if self.exists(row, config):
                each = math.prod(rows(axis, full) for axis in row.axes)
                total += each * (full["layers"] if "{layer}" in template else 1)
        return total

    def find(self, name: str) -> tuple[str, int | None] | None:
        """The template behind a tensor's name and the layer in it; None for a name of no row."""
        for template, pattern in self._patterns.items():
            if found := pattern.fullmatch(name):
                layer = found.groupdict().get("layer")
                return template, None if layer is None else int(layer)
        return None

    def check_tensors(self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError when these tensors are not the family's, by name or by shape."""
        expected = self.expected(config)
        for name, shape in shapes.items():
            if name not in expected and name != self.head:
                raise UserError(
                    f"{name}: no tensor of a {self.model_type} model with this config; read "
                    "docs/add-a-family.md to add it"
                )
            if name in expected and shape != expected[name]:
                raise UserError(
                    f"{name}: shape {shape}, but by config.json it must be {expected[name]}"
                )
        if missing := sorted(set(expected) - set(shapes)):
            raise UserError(
                f"{missing[0]} is missing ({len(missing)} in all): fetch the model again"
            )

    def readers(self, dim: str) -> list[str]:
        """Templates of the projections that read `dim` (their axis 1): what repair may re-solve."""
        return [
            template
            for template, row in self.tensors.items()
            if len(row.axes) == 2 and row.axes[1] == dim and template != self.embedding
        ]

    def step(self, dim: str, config: dict[str, Any], multiple_of: int = 1, **sizes: int) -> int:
        """Units of which `dim` must be a multiple, so that its rows are one of `multiple_of`.

        `sizes` override those of the config (of another dimension, for a joint cut).
        """
        full = {**self.sizes(config), **sizes}
        if dim == "hidden":
            return math.lcm(multiple_of, full["heads"] if self.heads_divide_hidden else 1)
        if dim == "heads":
            return math.lcm(
                multiple_of // math.gcd(multiple_of, full["head_dim"]), full["kv_heads"]
            )
        return multiple_of if dim in ("mlp", "vocab") else 1

    def check_sizes(
        self, config: dict[str, Any], sizes: dict[str, int], multiple_of: int = 1
    ) -> None:
        """Raise UserError when a model of this config cannot be cut to `sizes`, in units.

        The rows of every changed dimension must be a multiple of `multiple_of`, as the target
        format asks.
        """
        before = self.sizes(config)
        after = {**before, **sizes}
        for dim, want in sizes.items():
            key = self.config_keys.get(dim, dim)
            if dim == "head_dim" and want != before[dim]:
                raise UserError(f"head_dim {want}: it cannot be cut; this model has {before[dim]}")
            if not 1 <= want <= before[dim]:
                raise UserError(f"{key} {want}: allowed are 1 to {before[dim]}, what the model has")
        self._check_heads(before, after)
        for dim in ("hidden", "mlp", "heads", "vocab"):
            if after[dim] != before[dim]:
                step = self.step(dim, config, multiple_of, **after)
                self._check_step(dim, before[dim], after[dim], step)
        self._check_loads(config, before, after)

    def _check_heads(self, before: dict[str, int], after: dict[str, int]) -> None:
        heads, kv_heads = after["heads"], after["kv_heads"]
        most = before["heads"] // before["kv_heads"]
        if heads % kv_heads or heads // kv_heads > most:
            allowed = ", ".join(str(kv_heads * n) for n in range(1, most + 1))
            raise UserError(
                f"{self.config_keys['heads']} {heads} with {kv_heads} key/value heads: each of "
                f"those has the same number of query heads, at most {most}; allowed: {allowed}"
            )

    def _check_step(self, dim: str, before: int, after: int, step: int) -> None:
        if after % step == 0:
            return
        near = [n for n in (after - after % step, after - after % step + step) if 0 < n < before]
        advice = f"use {' or '.join(map(str, near))}" if near else f"leave it at {before}"
        raise UserError(
            f"{self.config_keys[dim]} {after}: in this model and for this target format it must be "
            f"a multiple of {step}; {advice}"
        )

    def _check_loads(
        self, config: dict[str, Any], before: dict[str, int], after: dict[str, int]
    ) -> None:
        """Refuse what the stock config class refuses to load, even where head_dim is explicit."""
        hidden, heads = after["hidden"], after["heads"]
        if (
            self.heads_divide_hidden
            and hidden % heads
            and (hidden, heads)
            != (
                before["hidden"],
                before["heads"],
            )
        ):
            allowed = [n for n in range(1, before["heads"] + 1) if hidden % n == 0]
            fitting = ", ".join(str(n) for n in allowed if n % after["kv_heads"] == 0)
            raise UserError(
                f"num_attention_heads {heads} with hidden_size {hidden}: transformers loads a "
                f"{self.model_type} model only if hidden_size is a multiple of the heads; "
                f"use {fitting or 'another hidden_size'}"
            )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if self.rope_factors_follow_hidden and (factors := rope.get("short_factor")):
            part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
            if int(hidden // heads * part) // 2 != len(factors):
                raise UserError(
                    f"hidden_size {hidden} with {heads} heads: transformers loads a "
                    f"{self.model_type} model with {len(factors)} long-RoPE factors only if "
                    f"hidden_size / heads stays {before['hidden'] // before['heads']}; cut both "
                    "alike or neither"
                )

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        def pattern(template: str) -> str:
            return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template))

        return {template: re.compile(pattern(template)) for template in self.tensors}


def rows(axis: str | tuple[str, ...], sizes: dict[str, int]) -> int:
    """Length of an axis: the units of its dimension(s) times the rows of one unit."""
    parts = (axis,) if isinstance(axis, str) else axis
    return sum(sizes[part] * unit_rows(part, sizes) for part in parts)


def unit_rows(dim: str, sizes: dict[str, int]) -> int:
    """Rows of a tensor that one unit of `dim` takes: head_dim for heads, else 1."""
    return sizes["head_dim"] if dim in ("heads", "kv_heads") else 1
