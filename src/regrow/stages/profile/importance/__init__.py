"""Importance criteria, one file each, named by the file.

`DIMS` are the dimensions a criterion can score, `NEEDS` the statistics it reads (the profile
gathers the union). `score(stats, weights, dim, generator)` gives one number per unit, higher =
keep. `stats[name]` is [units, width]; `weights()` yields every tensor that carries the dimension
as [units, rest], reading them from the checkpoint one at a time; `generator` is seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from torch import Tensor

Stats: TypeAlias = dict[str, Tensor]
Weights: TypeAlias = Callable[[], Iterator[Tensor]]

WIDTHS = frozenset({"mlp", "hidden", "heads", "kv_heads"})
