"""Importance criteria, one file each, named by the file.

`DIMS` are the dimensions a criterion can score, `NEEDS` the statistics it reads (the profile
gathers the union; those of `collect.GRADIENTS` take a backward pass, `gram` takes Gram matrices).
`score(stats, weights, dim, generator)` gives one number per unit [n], higher = keep; or, where the
choice depends on how many units go, a row for each number [n, n], row k − 1 for k gone.
`stats[name]` is [units, width], `stats["count"]` the number of units, `stats["tokens"]` that of
calibration tokens; `generator` is seeded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeAlias

from torch import Tensor

Stats: TypeAlias = dict[str, Tensor]

GRAMS = frozenset({"mlp", "heads", "kv_heads"})
"""Dimensions whose readers can have Gram matrices."""
READ = GRAMS | {"expert_mlp"}
"""Dimensions that one projection reads, whose input is observed channel by channel. Channels of an
expert are scored inside it, each times the router's weight for the token."""
WIDTHS = READ | {"hidden"}


class Weights(Protocol):
    """The weights of one dimension in one layer, read from the checkpoint one at a time."""

    def carrying(self) -> Iterator[Tensor]:
        """Every tensor that carries the dimension, readers and writers alike: [units, rest]."""
        ...

    def reading(self) -> Iterator[Tensor]:
        """Every projection that reads the dimension: [units, width, out]."""
        ...
