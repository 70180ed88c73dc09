"""Second moments of the inputs of linear modules, which calibrated methods read.

Shapes: B sequences, T tokens, N tokens that are not padding, C columns (inputs of a module).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regrow.runtime.precision import widen


class SecondMoments:
    """Mean x xᵀ of the inputs of linear modules; modules that read the same tensor share it."""

    def __init__(self) -> None:
        self.tokens = 0
        self.shares: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}
        self._real = torch.empty(0)
        self._seen: dict[str, Tensor] = {}

    def start(self, real_BT: Tensor) -> None:
        """Begin a batch; `real_BT` is True at the positions that are not padding."""
        self._real, self._seen = real_BT, {}
        self.tokens += int(real_BT.sum())

    def add(self, module: str, x_BTC: Tensor) -> None:
        """Add a module's input to its sum."""
        same = [other for other, x in self._seen.items() if x is x_BTC]
        first = self.shares.setdefault(module, same[0] if same else module)
        if first != module:
            return
        self._seen[module] = x_BTC
        x_NC = widen(x_BTC[self._real])
        total = x_NC.T @ x_NC
        self.sums[module] = self.sums[module] + total if module in self.sums else total

    def of(self, module: str) -> Tensor | None:
        """The second moment [C, C] of a module's input; None when it was not recorded."""
        if module not in self.shares:
            return None
        return self.sums[self.shares[module]] / self.tokens


@contextmanager
def second_moments(model: nn.Module, modules: list[str]) -> Iterator[SecondMoments]:
    """Sum the second moments of the inputs of those `modules` that are nn.Linear in the model."""
    moments = SecondMoments()
    linear = {name: module for name, module in model.named_modules() if name in modules}

    def watch(name: str) -> Any:
        return lambda module, inputs: moments.add(name, inputs[0])

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in linear.items()
        if isinstance(module, nn.Linear)
    ]
    yield moments
    for handle in handles:
        handle.remove()
