"""A row of a family's table: the named dimensions of a tensor, and where it stands.

The dimensions of a decoder, counted in units:

    layers      decoder layers; never an axis, but the {layer} in a tensor's name
    hidden      channels of the residual stream
    mlp         channels inside an MLP
    heads       query heads, `head_dim` rows of a tensor each
    kv_heads    key/value heads, `head_dim` rows of a tensor each
    vocab       token ids
    head_dim    channels of one head; stays as it is
    experts     MLPs that a router chooses among; the {expert} in a tensor's name
    expert_mlp  channels inside an expert
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

CONFIG_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
}
NAMED = {**CONFIG_KEYS, "experts": "num_experts", "expert_mlp": "moe_intermediate_size"}
"""What a dimension's size is called where a user gives it."""
GROUPED = 8
"""Rows that transformers multiplies for all experts at once are 16 bytes or a multiple: 8 values
in half precision."""
PER_LAYER: dict[str, Literal["each", "ids", "count"]] = {
    "layer_types": "each",
    "no_rope_layers": "each",
    "mlp_only_layers": "ids",
    "max_window_layers": "count",
}


LayerKind = Literal["sparse", "dense"]
"""Layers with experts, and those with an ordinary MLP among them."""


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
    layers: LayerKind | None = None
    """Which layers have the tensor, where some have experts and some an ordinary MLP."""

    def has(self, dim: str) -> bool:
        """Whether the dimension is an axis of the tensor, or part of one."""
        return any(dim in parts(axis) for axis in self.axes)


class Place(NamedTuple):
    """Where a tensor stands: its row, and the layer and the expert in its name."""

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
