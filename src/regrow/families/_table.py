"""The table of a family: its rows, and functions for shapes, counts and legal sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from regrow.errors import UserError
from regrow.families._rows import LayerKind, LayerRule, Tensor, TensorRef, parts

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
    eps: str = "rms_norm_eps"
    """Config key of the epsilon of the norms over hidden."""
    head_dim: int | None = None
    """Channels of one head in the projection that reads the heads, if no config key gives them."""
    writes_head_dim: bool = True
    """Whether the class reads `head_dim` from config.json, so that a cut can write it there."""
    residual_multiplier: float = 1.0
    """What the model multiplies the output of attention and MLP by, before it adds it to the
    stream (Granite)."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """For each dimension that cannot be cut, the reason; under `repair`, why there is none."""
    mixes: str = ""
    """Why documents that are packed into one sequence see each other in this model; empty if they
    do not."""
    derived: bool = False
    """Whether the table was found by `regrow.families.derive`, for one config."""

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
        raw["head_dim"] = self.head_dim or self.value(config, "head_dim")
        raw["head_dim"] = raw["head_dim"] or raw["hidden"] // raw["heads"]
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
        if dim == "kv_heads" and not kinds:  # every query head has its own keys and values
            return self.layers_of("heads", config)
        layers: set[int] = set().union(*(self._layers(kind, config) for kind in kinds))
        return sorted(layers)

    def _layers(self, kind: LayerKind | None, config: dict[str, Any]) -> list[int]:
        """Ids of the layers of one kind; None means all layers."""
        every = range(int(self.value(config, self.config_keys["layers"])))
        if isinstance(kind, LayerRule):
            return [n for n in every if self._of_layer(config, kind.key, n) in kind.values]
        if kind is None or self.dense_layers is None:
            return list(every)
        dense, period = (self.value(config, key) for key in self.dense_layers)
        sparse = [n for n in every if n not in (dense or ()) and (n + 1) % period == 0]
        return sparse if kind == "sparse" else [n for n in every if n not in sparse]

    def _of_layer(self, config: dict[str, Any], key: str, layer: int) -> Any:
        """What a config key says about one layer; see LayerRule."""
        if not key:
            return layer
        value, how = self.value(config, key), self.per_layer_config.get(key, "each")
        if how == "each":
            return value[layer] if layer < len(value) else None
        return layer in value if how == "ids" else layer < value

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
            place.name: row.shape(full)
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
        kinds = {row.layers for row in self.tensors.values()}
        having = {kind: len(self._layers(kind, config)) for kind in kinds}
        total = 0  # multiplied by the number of layers before the cut
        for template, row in self.tensors.items():
            if self.exists(row, config):
                each = math.prod(row.shape(full))
                if "{expert}" in template:
                    each *= experts
                elif len(row.axes) == 3 and row.axes[0] in ("experts", full.get("experts")):
                    each = each // full["experts"] * experts
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
