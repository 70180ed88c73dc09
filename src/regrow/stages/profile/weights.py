"""The weights of one dimension, unit by unit, read from the checkpoint one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.families import Family


def observed(dim: str) -> str:
    """The dimension whose activations tell of `dim`: KV heads are seen through their heads."""
    return "heads" if dim == "kv_heads" else dim


@dataclass(frozen=True)
class DimWeights:
    """The tensors of a checkpoint in which `dim` is an axis, in `layer` or, for "all", anywhere."""

    checkpoint: Checkpoint
    family: Family
    dim: str
    layer: int | str

    def carrying(self) -> Iterator[Tensor]:
        """Every tensor part with the dimension as an axis: [units, rest]."""
        sizes = self.family.sizes(self.checkpoint.config)
        for name, axes in self._tensors():
            for axis, dims in enumerate(axes):
                parts = (dims,) if isinstance(dims, str) else dims
                if self.dim not in parts:
                    continue
                lengths = [families.rows(part, sizes) for part in parts]
                pieces = self.checkpoint.tensor(name).split(lengths, axis)
                for part, piece in zip(parts, pieces, strict=True):
                    if part == self.dim:
                        yield piece.movedim(axis, 0).reshape(sizes[self.dim], -1)

    def reading(self) -> Iterator[Tensor]:
        """Every projection that reads the dimension, KV heads through their heads' channels.

        Shape [units, width, out].
        """
        units = self.family.sizes(self.checkpoint.config)[self.dim]
        readers = set(self.family.readers(observed(self.dim)))
        for name, _ in self._tensors():
            found = self.family.find(name)
            if found is not None and found[0] in readers:
                yield self.checkpoint.tensor(name).T.unflatten(0, (units, -1))

    def _tensors(self) -> Iterator[tuple[str, tuple[str | tuple[str, ...], ...]]]:
        for name in self.checkpoint.names():
            found = self.family.find(name)
            if found is not None and self.layer in ("all", found[1]):
                yield name, self.family.tensors[found[0]].axes
