"""Changes a model layer by layer; each is calibrated on inputs from the changed layers before it.

Shapes: C columns (the inputs of a linear layer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.calibration.modules import WEIGHT
from regrow.calibration.second_moments import second_moments
from regrow.checkpoint import Checkpoint
from regrow.families import Family
from regrow.layerwise import LayerByLayer, Spill
from regrow.runtime.progress import progress

Batches = list[dict[str, Tensor]]
Change = Callable[[str, Tensor, Tensor | None], Tensor]
"""Takes a module, its weight, and its inputs' second moment if any; returns the new weight."""


@dataclass(frozen=True)
class LayerPass:
    """Changes a model layer by layer, with one layer in memory at a time."""

    title: str
    """The title of the progress line."""
    checkpoint: Checkpoint
    family: Family
    modules: list[str]
    """All modules to change."""
    calibrated: set[str]
    """Modules whose change needs the second moment of their inputs."""
    batches: Batches
    """Calibration text."""
    change: Change
    device: torch.device
    streams: Spill

    @torch.no_grad()
    def run(self) -> None:
        """Change every layer from the first to the last, then the modules outside the layers."""
        changed: dict[str, Tensor] = {}
        shell = self._shell(changed)
        layers = len(shell.layers)
        tokens = sum(int(inputs["real"].sum()) for inputs in self.batches)
        with progress(self.title, tokens * layers) as counter:
            for layer in range(layers):
                prefix = f"model.layers.{layer}."
                mine = [module for module in self.modules if module.startswith(prefix)]
                watched = [module for module in mine if module in self.calibrated]
                with shell.resident(layer), second_moments(shell.model, watched) as moments:
                    for n, inputs in enumerate(self.batches):
                        moments.start(inputs["real"].to(self.device))
                        shell.step(inputs, self.streams.get(n) if layer else None)
                for module in mine:
                    changed[module + WEIGHT] = self._change(module, moments.of(module))
                if layer + 1 < layers:
                    self._pass_on(shell, layer)
                changed.clear()
                counter.advance(tokens)
        for module in self.modules:
            if not module.startswith("model.layers."):
                self._change(module, None)

    def _shell(self, changed: dict[str, Tensor]) -> LayerByLayer:
        def read(name: str) -> Tensor:
            return changed[name] if name in changed else self.checkpoint.tensor(name)

        return LayerByLayer.of(self.checkpoint, self.family, self.device, read)

    def _change(self, module: str, gram_CC: Tensor | None) -> Tensor:
        weight = self.checkpoint.tensor(module + WEIGHT).to(self.device)
        return self.change(module, weight, gram_CC)

    def _pass_on(self, shell: LayerByLayer, layer: int) -> None:
        """Compute the hidden states after the changed layer, the inputs of the next one."""
        with shell.resident(layer):
            for n, inputs in enumerate(self.batches):
                self.streams.put(n, shell.step(inputs, self.streams.get(n) if layer else None))
