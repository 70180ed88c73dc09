"""Layers removed one after the other, each time the one whose absence costs the least."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.layerwise import Pass
from regrow.progress import progress
from regrow.training.head import head_of
from regrow.training.teacher import mean_loss, reference_states

SHARE = 3  # a third of the layers is removed; the others are ranked by what each would cost next


@torch.no_grad()
def removal_order(model: PreTrainedModel, batches: list[dict[str, Tensor]], loss: str) -> Tensor:
    """Place of each layer in a greedy removal [layers], 0 for the first to go."""
    layers = list(model.get_submodule("model.layers").children())
    reference = reference_states(model, batches)
    left: list[int] = list(range(len(layers)))
    order: list[int] = []
    rounds = _rounds(len(layers))
    title = f"{loss} without each layer"
    with progress(title, passes_for(len(layers)), "passes") as counter:
        for _ in range(rounds + 1):
            cost = {}
            for layer in left:
                _skip(model, layers, {*order, layer})
                cost[layer] = mean_loss(model, batches, reference, head_of(model), loss)
                counter.advance(1)
            left.sort(key=lambda layer: cost[layer])
            if len(order) < rounds:
                order.append(left.pop(0))
    _skip(model, layers, set())
    place = torch.empty(len(layers))
    place[order + left] = torch.arange(len(layers), dtype=place.dtype)
    return place


def passes_for(layers: int) -> int:
    """Passes over the batches that a removal takes, about layers² / 3.6."""
    return sum(layers - gone for gone in range(_rounds(layers) + 1))


def _rounds(layers: int) -> int:
    return max(1, layers // SHARE)


def _skip(model: PreTrainedModel, layers: list[nn.Module], gone: set[int]) -> None:
    """Let these layers hand on what they get; masks and positions stay those of the others."""
    stack = [Pass(layer) if n in gone else layer for n, layer in enumerate(layers)]
    model.base_model.layers = nn.ModuleList(stack)
