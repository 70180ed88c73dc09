"""The table of a family: its rows, and functions for shapes, counts and legal sizes.

A row gives the name of a tensor and the named dimensions of its axes. The dimensions of a decoder,
counted in units:

    layers      decoder layers; never an axis, but the {layer} in a tensor's name
    hidden      channels of the residual stream
    mlp         channels inside an MLP
    heads       query heads, `head_dim` rows of a tensor each
    kv_heads    key/value heads, `head_dim` rows of a tensor each
    vocab       token ids
    head_dim    channels of one head; never cut
    experts     MLPs that a router chooses among; the {expert} in a tensor's name
    expert_mlp  channels inside an expert
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from regrow.errors import UserError

CONFIG_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
}
NAMED = {**CONFIG_KEYS, "experts": "num_experts", "expert_mlp": "moe_intermediate_size"}
"""The name of each dimension's size in options and messages."""
GROUPED = 8
"""transformers multiplies all experts at once, so their rows must be a multiple of 16 bytes: 8
values in half precision."""
PER_LAYER: dict[str, Literal["each", "ids", "count"]] = {
    "layer_types": "each",
    "no_rope_layers": "each",
    "mlp_only_layers": "ids",
    "max_window_layers": "count",
}


LayerKind = Literal["sparse", "dense"]
"""A layer with experts (sparse) or with an ordinary MLP (dense)."""


@dataclass(frozen=True)
class Tensor:
    """One row of a table: the dimension of each axis of a tensor."""

    axes: tuple[str | tuple[str, ...], ...]
    """For each axis its dimension, or the dimensions of its fused parts in order."""
    when: str | None = None
    """The tensor exists only if this config key is true, or false for "!key"."""
    norm: bool = False
    """Whether it is the weight of an RMSNorm over `hidden`. After a cut the norm averages over
    fewer channels, so its weight is multiplied by sqrt(old / new)."""
    layers: LayerKind | None = None
    """The kind of layer that has the tensor, in models with both kinds; None means every layer."""

    def has(self, dim: str) -> bool:
        """Whether the dimension is an axis of the tensor, or part of one."""
        return any(dim in parts(axis) for axis in self.axes)


class TensorRef(NamedTuple):
    """One tensor: its row in the table, and the layer and expert numbers in its name."""

    template: str
    layer: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """The tensor's name on disk."""
        return self.template.replace("{layer}", str(self.layer)).replace(
            "{expert}", str(self.expert)
        )


def rows(axis: str | tuple[str, ...], sizes: dict[str, int]) -> int:
    """Length of an axis: the units of its dimension(s) times the rows of one unit."""
    return sum(sizes[part] * unit_rows(part, sizes) for part in parts(axis))


def parts(axis: str | tuple[str, ...]) -> tuple[str, ...]:
    """The dimensions of an axis, in order: one, or those of its fused parts."""
    return (axis,) if isinstance(axis, str) else axis


def unit_rows(dim: str, sizes: dict[str, int]) -> int:
    """Rows of a tensor that one unit of `dim` takes: head_dim for heads, else 1."""
    return sizes["head_dim"] if dim in ("heads", "kv_heads") else 1


@dataclass(frozen=True)
class Family:
    """A model family: its tensors, by name on disk, and the modules that use their dimensions."""

    model_type: str
    """`model_type` in config.json, and the name of the family's Python file."""
    tensors: dict[str, Tensor]
    """Every tensor that a checkpoint can have, by its name with {layer} for the layer's number and
    {expert} for the expert's number."""
    observe: dict[str, tuple[str, ...]]
    """For each dimension, the modules to observe: their input for mlp and heads, their output for
    hidden; for experts the module that receives tokens, chosen experts and router weights."""
    residual: dict[str, str]
    """For mlp (or experts) and heads, the module whose input is the stream that they add to."""
    post_norm: dict[str, str] = field(default_factory=dict, kw_only=True)
    """For each dimension, the norm between the last projection and the stream, if there is one."""
    defaults: dict[str, Any]
    """Defaults of transformers for keys that config.json may omit (None: derived from others)."""
    norm_offset: float = 0.0
    """The number that the model adds to a stored norm weight (Gemma: 1)."""
    scaled_embedding: bool = False
    """Whether the model multiplies its embedding by sqrt(hidden_size) (Gemma)."""
    config_keys: dict[str, str] = field(default_factory=lambda: dict(CONFIG_KEYS))
    """The config key of each dimension."""
    per_layer_config: Mapping[str, Literal["each", "ids", "count"]] = field(
        default_factory=lambda: dict(PER_LAYER)
    )
    """Config keys that a cut of layers changes: a list with an entry for each layer, a list of
    layer ids, or a count of the first layers."""
    sliding_period: tuple[str, int] | None = None
    """Config key and default of the period n: every nth layer has full attention, the others have a
    sliding window. It is used when the config has no layer_types."""
    heads_divide_hidden: bool = False
    """Whether transformers refuses a hidden_size that is not a multiple of the number of heads."""
    rope_factors_follow_hidden: bool = False
    """Whether transformers checks the length of long-RoPE factors against hidden_size / heads."""
    memory: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameters that transformers stores differently in memory: for each name in memory, the
    templates of the parts on disk. The parts are concatenated, and those of all experts stacked."""
    dense_layers: tuple[str, str] | None = None
    """Two config keys of a mixture of experts: the ids of layers without experts, and the period n
    if only every nth layer has experts."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names that a config.json may use for a key."""
    gguf: str | None = None
    """llama.cpp's name for the family (GGUF key general.architecture); None if not supported."""
    embedding: str = "model.embed_tokens.weight"
    """Name of the token embedding [vocab, hidden]."""
    final_norm: str = "model.norm.weight"
    """Name of the norm before the output head."""
    head: str = "lm_head.weight"
    """Name of the output head [vocab, hidden]; absent when tied to the embedding."""

    def value(self, config: dict[str, Any], key: str) -> Any:
        """`config[key]`, or the default of transformers if config.json has no such key.

        Raises UserError when there is no default.
        """
        for name in (key, self.aliases.get(key, key)):
            if name in config:
                return config[name]
        if key not in self.defaults:
            raise UserError(f"config.json of this {self.model_type} model lacks {key}: add it")
        return self.defaults[key]

    def sizes(self, config: dict[str, Any]) -> dict[str, int]:
        """Number of units per dimension, and head_dim, as transformers reads them from a config.

        Raises UserError when a size is missing in config.json.
        """
        raw = {dim: self.value(config, key) for dim, key in self.config_keys.items()}
        if raw["kv_heads"] is None:
            raw["kv_heads"] = raw["heads"]
        raw["head_dim"] = self.value(config, "head_dim") or raw["hidden"] // raw["heads"]
        return {dim: int(size) for dim, size in raw.items()}

    def exists(self, row: Tensor, config: dict[str, Any]) -> bool:
        """Whether a checkpoint with this config has the tensor of this row."""
        if row.when is None:
            return True
        wanted = not row.when.startswith("!")
        return bool(self.value(config, row.when.removeprefix("!"))) == wanted

    def layers_of(self, dim: str, config: dict[str, Any]) -> list[int]:
        """Ids of the layers that have units of `dim`."""
        kinds = {
            row.layers for name, row in self.tensors.items() if "{layer}" in name and row.has(dim)
        }
        layers: set[int] = set().union(*(self._layers(kind, config) for kind in kinds))
        return sorted(layers)

    def _layers(self, kind: LayerKind | None, config: dict[str, Any]) -> list[int]:
        """Ids of the layers of one kind; None means all layers."""
        every = range(int(self.value(config, self.config_keys["layers"])))
        if kind is None or self.dense_layers is None:
            return list(every)
        dense, period = (self.value(config, key) for key in self.dense_layers)
        sparse = [n for n in every if n not in (dense or ()) and (n + 1) % period == 0]
        return sparse if kind == "sparse" else [n for n in every if n not in sparse]

    def places(
        self,
        template: str,
        config: dict[str, Any],
        layers: Iterable[int] | None = None,
        experts: Iterable[int] | None = None,
    ) -> Iterator[TensorRef]:
        """Every tensor of a table row, in the given layers and experts (by default in all)."""
        row = self.tensors[template]
        if not self.exists(row, config):
            return
        every: Iterable[int | None] = [None]
        if "{layer}" in template:
            having = self._layers(row.layers, config)
            every = having if layers is None else [n for n in layers if n in having]
        each: Iterable[int | None] = [None]
        if "{expert}" in template:
            each = range(self.sizes(config)["experts"]) if experts is None else list(experts)
        for layer in every:
            for expert in each:
                yield TensorRef(template, layer, expert)

    def expected(
        self, config: dict[str, Any], sizes: dict[str, int] | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint; `sizes` override those of the config."""
        full = {**self.sizes(config), **(sizes or {})}
        config = {**config, **{key: full[dim] for dim, key in self.config_keys.items()}}
        return {
            place.name: tuple(rows(axis, full) for axis in row.axes)
            for template, row in self.tensors.items()
            for place in self.places(template, config)
        }

    def count(self, config: dict[str, Any], sizes: dict[str, int] | None = None) -> int:
        """Number of parameters, tied weights counted once; `sizes` override those of the config.

        When layers are cut and only some have experts, their share is assumed to stay the same.
        """
        full = {**self.sizes(config), **(sizes or {})}
        return self._count(config, full, full.get("experts", 0))

    def copies(self, template: str, config: dict[str, Any], sizes: dict[str, int]) -> int:
        """Number of tensors of a table row in a model of these sizes; `sizes` must be complete."""
        if "{layer}" not in template:
            return 1
        having = len(self._layers(self.tensors[template].layers, config))
        before = int(self.value(config, self.config_keys["layers"]))
        layers = round(having * sizes["layers"] / before)
        return layers * (sizes["experts"] if "{expert}" in template else 1)

    def active(self, config: dict[str, Any]) -> int:
        """Number of parameters that one token uses; only chosen experts are counted."""
        full = self.sizes(config)
        run = int(self.value(config, "num_experts_per_tok")) if "experts" in full else 0
        return self._count(config, full, run)

    def _count(self, config: dict[str, Any], full: dict[str, int], experts: int) -> int:
        before = int(self.value(config, self.config_keys["layers"]))
        kinds: tuple[LayerKind | None, ...] = (None, "sparse", "dense")
        having = {kind: len(self._layers(kind, config)) for kind in kinds}
        total = 0  # multiplied by the number of layers before the cut
        for template, row in self.tensors.items():
            if self.exists(row, config):
                each = math.prod([rows(axis, full) for axis in row.axes])
                each *= experts if "{expert}" in template else 1
                layered = "{layer}" in template
                total += each * (full["layers"] * having[row.layers] if layered else before)
        return (total + before // 2) // before

    def find(self, name: str) -> TensorRef | None:
        """The row, layer and expert of a tensor's name; None if no row has such a name."""
        for template, pattern in self._patterns.items():
            if match := pattern.fullmatch(name):
                ids = {key: int(value) for key, value in match.groupdict().items()}
                return TensorRef(template, ids.get("layer"), ids.get("expert"))
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
        """Templates of the projections that read `dim` (their axis 1); repair may re-solve them."""
        return [
            template
            for template, row in self.tensors.items()
            if len(row.axes) == 2 and row.axes[1] == dim and template != self.embedding
        ]

    def norm_before(self, template: str) -> str | None:
        """Template of the norm whose output a row's projection reads; None if it reads no norm.

        Such projections (in attention, MLP, router, expert, head) have hidden as second axis.
        """
        row = self.tensors[template]
        if len(row.axes) != 2 or row.axes[1] != "hidden" or template == self.embedding:
            return None
        if template == self.head:
            return self.final_norm
        part = "heads" if set(parts(row.axes[0])) <= {"heads", "kv_heads"} else "mlp"
        return self.residual[part] + ".weight"

    def step(self, dim: str, config: dict[str, Any], multiple_of: int = 1, **sizes: int) -> int:
        """The number of units of `dim` must be a multiple of this, so its rows fit `multiple_of`.

        `sizes` override those of the config, for a joint cut with another dimension.
        """
        full = {**self.sizes(config), **sizes}
        if "experts" in full and dim in ("hidden", "expert_mlp"):
            multiple_of = math.lcm(multiple_of, GROUPED)
        if dim == "hidden":
            return math.lcm(multiple_of, full["heads"] if self.heads_divide_hidden else 1)
        if dim == "heads":
            return math.lcm(
                multiple_of // math.gcd(multiple_of, full["head_dim"]), full["kv_heads"]
            )
        return multiple_of if dim in ("mlp", "expert_mlp", "vocab") else 1

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        def pattern(template: str) -> str:
            return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template))

        return {template: re.compile(pattern(template)) for template in self.tensors}
