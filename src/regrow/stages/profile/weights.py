"""The weights of one dimension, unit by unit, read from the checkpoint one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.families import Family, Place


def observed(dim: str) -> str:
    """The dimension whose activations tell of `dim`: KV heads are seen through their heads."""
    return "heads" if dim == "kv_heads" else dim


@dataclass(frozen=True)
class DimWeights:
    """The tensors of a checkpoint in which `dim` is an axis, in `layer` or, for "all", anywhere.

    For expert_mlp those of one `expert`; for experts also all that is in each of them.
    """

    checkpoint: Checkpoint
    family: Family
    dim: str
    layer: int | str
    expert: int | None = None

    def carrying(self) -> Iterator[Tensor]:
        """Every tensor part with the dimension as an axis: [units, rest]."""
        sizes = self.family.sizes(self.checkpoint.config)
        for template, row in self.family.tensors.items():
            if self.dim == "experts" and "{expert}" in template:
                yield torch.stack([self._read(place).flatten() for place in self._places(template)])
            for axis, dims in enumerate(row.axes):
                parts = families.parts(dims)
                if self.dim not in parts:
                    continue
                lengths = [families.rows(part, sizes) for part in parts]
                for place in self._places(template):
                    pieces = self._read(place).split(lengths, axis)
                    for part, piece in zip(parts, pieces, strict=True):
                        if part == self.dim:
                            yield piece.movedim(axis, 0).reshape(sizes[self.dim], -1)

    def reading(self) -> Iterator[Tensor]:
        """Every projection that reads the dimension, KV heads through their heads' channels.

        Shape [units, width, out].
        """
        units = self.family.sizes(self.checkpoint.config)[self.dim]
        for template in self.family.readers(observed(self.dim)):
            for place in self._places(template):
                yield self._read(place).T.unflatten(0, (units, -1))

    def _read(self, place: Place) -> Tensor:
        return self.checkpoint.tensor(place.name)

    def _places(self, template: str) -> Iterator[Place]:
        layers = None if self.layer == "all" else [int(self.layer)]
        experts = None if self.expert is None else [self.expert]
        return self.family.places(template, self.checkpoint.config, layers, experts)
