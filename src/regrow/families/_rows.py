"""One row of a family's table: a tensor's name, and the named dimension of each of its axes.

The dimensions of a decoder, counted in units:

    layers      decoder layers; the {layer} in a tensor's name, rarely an axis
    hidden      channels of the residual stream
    mlp         channels inside an MLP
    heads       query heads, `head_dim` rows of a tensor each
    kv_heads    key/value heads, `head_dim` rows of a tensor each
    vocab       token ids
    head_dim    channels of one head; never cut
    experts     MLPs that a router chooses among; the {expert} in a tensor's name, or an axis
    expert_mlp  channels inside an expert
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Axis = str | int | tuple[str, ...]
"""A dimension, the dimensions of fused parts in order, or a fixed length that is never cut."""


class LayerRule(NamedTuple):
    """Which layers have a tensor, by a config key: those for which it has one of these values.

    The value of a layer is the layer's entry in a list with one entry for each layer, whether the
    layer is in a list of layer ids, or whether it is one of the first n layers for a number n.
    """

    key: str
    values: tuple[Any, ...]


LayerKind = Literal["sparse", "dense"] | LayerRule
"""Layers with experts (sparse), with an ordinary MLP (dense), or given by a config key."""


@dataclass(frozen=True)
class Tensor:
    """One row of a table: the dimension of each axis of a tensor."""

    axes: tuple[Axis, ...]
    """For each axis its dimension, those of its fused parts in order, or a fixed length."""
    when: str | None = None
    """The tensor exists only if this config key is true, or false for "!key"."""
    norm: bool = False
    """Whether it is the weight of an RMSNorm over its axis. After a cut the norm averages over
    fewer channels, so its weight is multiplied by sqrt(old / new)."""
    layers: LayerKind | None = None
    """The kind of layer that has the tensor, in models with several kinds; None: every layer."""
    unit: Mapping[str, int] = field(default_factory=dict)
    """Rows of one unit of a dimension, where it is not `unit_rows` (gate and up interleaved: 2)."""

    def has(self, dim: str) -> bool:
        """Whether the dimension is an axis of the tensor, or part of one."""
        return any(dim in parts(axis) for axis in self.axes)

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The tensor's shape in a model of these sizes."""
        return tuple(rows(axis, sizes, self.unit) for axis in self.axes)

    def rows_of(self, dim: str, sizes: dict[str, int]) -> int:
        """Rows that one unit of `dim` takes in this tensor."""
        return self.unit.get(dim) or unit_rows(dim, sizes)


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


def rows(axis: Axis, sizes: dict[str, int], unit: Mapping[str, int] | None = None) -> int:
    """Length of an axis: the units of its dimension(s) times the rows of one unit."""
    if isinstance(axis, int):
        return axis
    unit = unit or {}
    return sum(sizes[part] * (unit.get(part) or unit_rows(part, sizes)) for part in parts(axis))


def parts(axis: Axis) -> tuple[str, ...]:
    """The dimensions of an axis, in order: one, those of its fused parts, or none if fixed."""
    if isinstance(axis, int):
        return ()
    return (axis,) if isinstance(axis, str) else axis


def unit_rows(dim: str, sizes: dict[str, int]) -> int:
    """Rows of a tensor that one unit of `dim` takes: head_dim for heads, else 1."""
    return sizes["head_dim"] if dim in ("heads", "kv_heads") else 1
