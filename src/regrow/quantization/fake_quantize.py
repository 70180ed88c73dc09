"""Quantization-aware training: every linear layer computes with its rounded weight."""

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
"""The dtype in which a quantized folder stores its scales."""


def bind_rounding(student: PreTrainedModel, scheme: Scheme) -> Callable[[], None]:
    """Make the student's linear layers, except its head, compute with rounded weights.

    Each group of weights uses the grid on which it already lies, or else the grid with the least
    squared error; the grids stay fixed. The parameters themselves are not rounded, and their names
    and the saved tensors do not change. Gradients pass straight through the rounding (Jacob et al.,
    2018, arXiv:1712.05877). A layer whose width does not fit gets the scheme's fallback. The
    returned function restores the layers and rounds their weights to the grids.
    """
    linear = _linear_layers(student)
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
def round_weights(model: PreTrainedModel, scheme: Scheme) -> None:
    """Round the weights of the linear layers, except the head, to the grids of a scheme.

    The model gets new tensors, so that another model with views of the old ones does not change.
    """
    for module in _linear_layers(model):
        weight_RC = module.weight.data
        rounded_RC = grid_of(weight_RC, scheme).nearest(weight_RC).to(weight_RC.dtype)
        module.weight = nn.Parameter(rounded_RC, requires_grad=False)


def _linear_layers(model: PreTrainedModel) -> list[nn.Linear]:
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


@torch.no_grad()
def grid_of(weight_RC: Tensor, scheme: Scheme) -> Grid:
    """The grid for training a weight."""
    columns = weight_RC.shape[1]
    equal_weights = torch.ones(columns, device=weight_RC.device)
    return fit(weight_RC, scheme.fitting(columns), STORED, equal_weights)
