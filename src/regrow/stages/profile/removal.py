"""Layers removed one after the other, each time the one whose absence costs the least."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.progress import progress
from regrow.stages.profile.orders import Pass
from regrow.training.head import Mix, head_loss, head_of
from regrow.training.teacher import final_hidden, scored

REMOVALS = {"kl_removal": "forward_kl", "cross_entropy_removal": "cross_entropy"}
"""Statistic of a removal → the loss that tells what an absence costs."""
SHARE = 3  # a third of the layers is removed; the others are ranked by what each would cost next


@torch.no_grad()
def removal_order(model: PreTrainedModel, batches: list[dict[str, Tensor]], loss: str) -> Tensor:
    """Place of each layer in a greedy removal [layers], 0 for the first to go."""
    layers = list(model.get_submodule("model.layers").children())
    reference = [final_hidden(model, batch)[scored(batch)] for batch in batches]
    left: list[int] = list(range(len(layers)))
    order: list[int] = []
    rounds = _rounds(len(layers))
    title = f"{loss} without each layer"
    with progress(title, passes_for(len(layers)), "passes") as counter:
        for _ in range(rounds + 1):
            cost = {}
            for layer in left:
                _skip(model, layers, {*order, layer})
                cost[layer] = _loss(model, batches, reference, loss)
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


def _loss(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], reference: list[Tensor], loss: str
) -> float:
    """Mean of the loss over the scored tokens, against the whole model's final hidden states."""
    total, tokens = 0.0, 0
    head, mix = head_of(model), Mix({loss: 1.0})
    for batch, teacher_NH in zip(batches, reference, strict=True):
        mask = scored(batch)
        hidden_NH = final_hidden(model, batch)[mask]
        targets_N = batch["labels"][:, 1:][mask].to(hidden_NH.device)
        value, _ = head_loss(hidden_NH, head, targets_N, mix, teacher_NH, head)
        total, tokens = total + float(value), tokens + len(targets_N)
    return total / tokens
