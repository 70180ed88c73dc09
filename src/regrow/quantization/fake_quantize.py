"""Training for a grid: every linear layer computes with its weight as it will be rounded."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from regrow.quantization.formats import Scheme
from regrow.quantization.grid import Grid, fake_quantize, fit

STORED = torch.bfloat16
"""What the scales of a quantized folder are stored in."""


def bind_rounding(student: PreTrainedModel, scheme: Scheme) -> Callable[[], None]:
    """Make the student's linear layers, but not its head, compute with rounded weights.

    Each has the grid that its weight lies on, else the one of least squares for it, and keeps it.
    The weights themselves, their names and what is saved stay. Gradients pass straight through
    (Jacob et al., 2018, arXiv:1712.05877). A layer whose width does not fit gets the scheme's
    fallback. What is returned ends it, with the weights rounded as they were computed with.
    """
    head = student.get_output_embeddings()
    linear = [m for m in student.modules() if isinstance(m, nn.Linear) and m is not head]
    grids = {module: grid_of(module.weight, scheme) for module in linear}

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return functional.linear(x, fake_quantize(self.weight, grids[self]), self.bias)

    for module in linear:
        module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]

    def settle() -> None:
        for module in linear:
            del module.forward
            module.weight.data = grids[module].nearest(module.weight.data)

    return settle


@torch.no_grad()
def grid_of(weight_RC: Tensor, scheme: Scheme) -> Grid:
    """The grid to train a weight for."""
    columns = weight_RC.shape[1]
    every = torch.ones(columns, device=weight_RC.device)
    return fit(weight_RC, scheme.fitting(columns), STORED, every)
