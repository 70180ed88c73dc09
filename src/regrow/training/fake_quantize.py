"""Training for a grid: every linear layer computes with its weight as it will be rounded."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from regrow.quantization.grid import fake_quantize
from regrow.quantization.schemes import Scheme, fitting

STORED = torch.bfloat16
"""What the scales of a quantized folder are stored in."""


def bind_rounding(student: PreTrainedModel, scheme: Scheme) -> Callable[[], None]:
    """Make the student's linear layers, but not its head, round their weights; returns the undo.

    The weights themselves, their names and what is saved stay: rounding them to nearest afterwards
    gives what was computed with. Gradients pass straight through (Jacob et al., 2018,
    arXiv:1712.05877). A layer whose width does not fit gets the scheme's fallback.
    """
    head = student.get_output_embeddings()
    linear = [m for m in student.modules() if isinstance(m, nn.Linear) and m is not head]

    def rounded(own: Scheme) -> Callable[[nn.Linear, Tensor], Tensor]:
        def forward(self: nn.Linear, x: Tensor) -> Tensor:
            return functional.linear(x, fake_quantize(self.weight, own, STORED), self.bias)

        return forward

    for module in linear:
        forward = rounded(fitting(scheme, module.in_features))
        module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]

    def undo() -> None:
        for module in linear:
            del module.forward

    return undo
