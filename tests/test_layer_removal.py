"""Greedy removal of layers, against models that are cut for each choice and run in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from regrow.stages.profile.collect import REMOVALS
from regrow.stages.profile.passes import removal_order
from regrow.training.teacher import scored

LAYERS = 7


def batch() -> dict[str, Tensor]:
    """Two blocks of two documents each; the first tokens of the second are a prompt."""
    ids = torch.randint(5, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(6), torch.arange(10)]).expand(2, -1)
    labels = ids.clone()
    labels[:, [0, 6, 7, 8]] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def slow_loss(model: PreTrainedModel, kept: list[int], loss: str) -> float:
    """Mean loss of the model with these layers, by full logits, document by document."""
    inputs = batch()
    all_layers = list(model.model.layers)
    rows = []
    for layers in (range(len(all_layers)), kept):
        model.model.layers = torch.nn.ModuleList([all_layers[n] for n in layers])
        model.config.num_hidden_layers = len(model.model.layers)
        parts = [model(inputs["input_ids"][:, p], use_cache=False).logits for p in DOCUMENTS]
        rows.append(torch.cat(parts, 1)[:, :-1].log_softmax(-1))
    model.model.layers = torch.nn.ModuleList(all_layers)
    model.config.num_hidden_layers = len(all_layers)
    log_p, log_q = rows
    if loss == "forward_kl":
        value = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        value = -log_q.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return float(value[scored(inputs)].mean())


DOCUMENTS = (slice(0, 6), slice(6, 16))


@torch.no_grad()
@pytest.mark.parametrize("loss", sorted(REMOVALS.values()))
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_each_round_removes_the_layer_of_lowest_loss(model_type: str, loss: str) -> None:
    model = tiny_model(model_type, torch.float64, seed=3, num_hidden_layers=LAYERS).eval()
    left, gone = list(range(LAYERS)), []
    for _ in range(LAYERS // 3 + 1):
        costs = {n: slow_loss(model, [m for m in left if m != n], loss) for n in left}
        ranked = sorted(left, key=lambda n: costs[n])
        if len(gone) < LAYERS // 3:
            gone.append(ranked[0])
            left.remove(ranked[0])
    place = removal_order(model, [batch()], loss)
    assert place.argsort().tolist() == [*gone, *ranked]
    assert len(list(model.model.layers)) == LAYERS
    assert not any(type(layer).__name__ == "Pass" for layer in model.model.layers)
