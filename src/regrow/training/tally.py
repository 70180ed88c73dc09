"""Sums over micro-batches, turned into means per scored token over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

TOKENS = "tokens"
OWN = "tokens of "
"""Before the name of what is not taken of all tokens: how many it is taken of."""


class Tally:
    """Running sums by name; `tokens` or, where there is one, `tokens of NAME` divides them."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, row: Mapping[str, Tensor]) -> None:
        """Add the sums of a micro-batch, `tokens` among them."""
        for name, value in row.items():
            so_far = self.sums.get(name, torch.zeros((), device=value.device))
            self.sums[name] = so_far + value.detach()

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean of each by name, and begin anew; `reduce` sums a tensor over the ranks.

        What no token was scored for is left out.
        """
        sums, self.sums = self.sums, {}
        if not sums:
            return {}
        totals = reduce(torch.stack([value.double() for value in sums.values()])).tolist()
        gathered = dict(zip(sums, totals, strict=True))
        tokens = gathered.pop(TOKENS)
        own = {name.removeprefix(OWN): n for name, n in gathered.items() if name.startswith(OWN)}
        counts = {name: own.get(name, tokens) for name in gathered if not name.startswith(OWN)}
        return {name: gathered[name] / count for name, count in counts.items() if count}
