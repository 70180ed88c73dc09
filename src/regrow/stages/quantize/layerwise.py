"""Rounds a model layer by layer; each is calibrated on inputs from the rounded layers before it.

Shapes: N tokens, C columns (the inputs of a linear layer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.checkpoint import Checkpoint
from regrow.families import Family
from regrow.layerwise import LayerByLayer, Spill
from regrow.quantization.formats import Scheme
from regrow.quantization.grid import Grid
from regrow.runtime.precision import widen
from regrow.runtime.progress import progress
from regrow.stages.quantize.choose import WEIGHT

Batches = list[dict[str, Tensor]]
Round = Callable[[Tensor, Scheme, Tensor | None], tuple[Tensor, Grid]]
"""Takes a weight, its scheme and its inputs' second moment; returns the rounded weight and grid."""


@dataclass(frozen=True)
class LayerPass:
    """Rounds a model layer by layer, with one layer in memory at a time."""

    checkpoint: Checkpoint
    family: Family
    chosen: dict[str, Scheme]
    calibrated: set[str]
    """Modules whose rounding needs the second moment of their inputs."""
    batches: Batches
    """Calibration text."""
    round: Round
    put: Callable[[str, Tensor, Grid], None]
    """Callback that receives each module's name, rounded weight and grid."""
    device: torch.device
    streams: Spill

    @torch.no_grad()
    def run(self) -> None:
        """Round every layer from the first to the last, then the modules outside the layers."""
        rounded: dict[str, Tensor] = {}
        shell = self._shell(rounded)
        layers = len(shell.layers)
        tokens = sum(int(inputs["real"].sum()) for inputs in self.batches)
        with progress("quantize", tokens * layers) as counter:
            for layer in range(layers):
                prefix = f"model.layers.{layer}."
                mine = [module for module in self.chosen if module.startswith(prefix)]
                watched = [module for module in mine if module in self.calibrated]
                with shell.resident(layer), second_moments(shell.model, watched) as moments:
                    for n, inputs in enumerate(self.batches):
                        moments.start(inputs["real"].to(self.device))
                        shell.step(inputs, self.streams.get(n) if layer else None)
                for module in mine:
                    rounded[module + WEIGHT] = self._round(module, moments.of(module))
                if layer + 1 < layers:
                    self._pass_on(shell, layer)
                rounded.clear()
                counter.advance(tokens)
        for module in self.chosen:
            if not module.startswith("model.layers."):
                self._round(module, None)

    def _shell(self, rounded: dict[str, Tensor]) -> LayerByLayer:
        def read(name: str) -> Tensor:
            return rounded[name] if name in rounded else self.checkpoint.tensor(name)

        return LayerByLayer.of(self.checkpoint, self.family, self.device, read)

    def _round(self, module: str, gram_CC: Tensor | None) -> Tensor:
        weight = self.checkpoint.tensor(module + WEIGHT).to(self.device)
        weight, grid = self.round(weight, self.chosen[module], gram_CC)
        self.put(module, weight, grid)
        return weight

    def _pass_on(self, shell: LayerByLayer, layer: int) -> None:
        """Compute the hidden states after the rounded layer, the inputs of the next one."""
        with shell.resident(layer):
            for n, inputs in enumerate(self.batches):
                self.streams.put(n, shell.step(inputs, self.streams.get(n) if layer else None))


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
