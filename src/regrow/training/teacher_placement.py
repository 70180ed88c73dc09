"""How a frozen teacher's weights are held: whole, in 8 bits, in shares, or on disk until they run.

Shapes: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.layerwise import LayerByLayer
from regrow.quantization.formats import SCHEMES
from regrow.quantization.grid import fit
from regrow.training import sharding

TeacherPlacement: TypeAlias = Literal["whole", "int8", "shares", "disk"]


def place_teacher(
    checkpoint: Checkpoint, how: TeacherPlacement, device: torch.device
) -> PreTrainedModel:
    """A checkpoint's model in bfloat16, to be run and not trained.

    `whole` and `int8` on the device, `shares` over all ranks (`sharding.share`); `disk`: embedding,
    last norm and head on the device, a block only while it runs, read from its file each time.
    """
    if how == "disk":
        family = families.of(checkpoint)
        return LayerByLayer.of(checkpoint, family, device, dtype=torch.bfloat16).streamed()
    model = checkpoint.model(torch.bfloat16, device if how == "whole" else "cpu")
    if how == "int8":
        round_linear(model)
        model.to(device)  # type: ignore[arg-type]
    elif how == "shares":
        sharding.share(model, device)
    return model


class Int8Linear(nn.Module):
    """A linear layer whose weight is held as integers, with a scale per row.

    y = (x · Qᵀ) · s + b with W ≈ s · Q: products with whole numbers up to 128, which bfloat16 holds
    exactly, then the scale, so that no rounded weight is ever made.
    """

    codes_RC: Tensor
    scale_R: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight_RC = layer.weight.detach()
        grid = fit(weight_RC, SCHEMES["int8"], weight_RC.dtype)
        codes_RC = (grid.nearest(weight_RC) / grid.scale_RG.float()).round().to(torch.int8)
        self.register_buffer("codes_RC", codes_RC)
        self.register_buffer("scale_R", grid.scale_RG.squeeze(1))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Of inputs [..., C] outputs [..., R], in the dtype of the inputs."""
        y = functional.linear(x, self.codes_RC.to(x.dtype)) * self.scale_R.to(x.dtype)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def round_linear(model: PreTrainedModel) -> None:
    """Put an Int8Linear in the place of every linear layer but the head, one after the other.

    Routers and stacked experts are no linear layers, and stay.
    """
    head = model.get_output_embeddings()
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    while linear:
        name, module = linear.pop()
        model.set_submodule(name, Int8Linear(module))
