"""Passes over calibration text, with the whole model in memory or one decoder layer at a time.

Both orders give the same numbers. The layer-by-layer order keeps one layer's weights on the device
and stores the hidden states of all sequences on disk, for models larger than the device. Other
passes remove layers one by one, and count token ids in much more text.

L layers, N tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regrow.checkpoint import Checkpoint
from regrow.data import DataConfig
from regrow.data.blend import BuildContext, blend
from regrow.layerwise import LayerByLayer, SkippedLayer, Spill
from regrow.runtime import distributed
from regrow.runtime.progress import Progress, progress
from regrow.stages.profile.collect import Batch, Collector
from regrow.training.head import head_loss, head_of
from regrow.training.loss_weights import LossWeights
from regrow.training.model_check import check_model
from regrow.training.teacher import final_hidden, mean_loss, reference_states, scored

Batches = list[tuple[Batch, dict[str, Tensor]]]
"""For each batch: its tokens and subset for the hooks; input_ids, position_ids and labels."""
TakeGrams = Callable[[int], None]


def resident(
    checkpoint: Checkpoint,
    batches: Batches,
    collector: Collector,
    take_grams: TakeGrams,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    """Run every batch through the model on `device`, and backward if a statistic needs it."""
    model = checkpoint.model(dtype, device).requires_grad_(False)
    check_model(model)
    if collector.backward:
        model.enable_input_require_grads()
    run_through(model, batches, collector, progress)
    for layer in range(model.config.num_hidden_layers):
        take_grams(layer)


def run_through(
    model: PreTrainedModel, batches: Batches, collector: Collector, progress: Progress
) -> None:
    """One pass of all batches through a model in memory, with the collector's hooks attached."""
    handles = collector.attach(model, range(model.config.num_hidden_layers), final=True)
    for batch, inputs in batches:
        collector.start(_on(batch, model.device))
        moved = {key: value.to(model.device) for key, value in inputs.items()}
        with torch.set_grad_enabled(collector.backward):
            hidden_BTH = final_hidden(model, moved)
            if collector.backward:
                _backward(model, hidden_BTH, moved)
        progress.advance(int(batch.real_BT.sum()) * distributed.world_size())
    for handle in handles:
        handle.remove()


@torch.no_grad()
def layer_major(
    checkpoint: Checkpoint,
    batches: Batches,
    collector: Collector,
    take_grams: TakeGrams,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    spill: Spill,
) -> None:
    """Run all batches through one decoder layer after another; hidden states are kept on disk."""
    config = checkpoint.stock_config()
    given = (collector.family, config, checkpoint.names(), checkpoint.tensor)
    shell = LayerByLayer(*given, dtype, device)
    last = len(shell.layers) - 1
    for layer in range(last + 1):
        with shell.resident(layer):
            handles = collector.attach(shell.model, [layer], final=layer == last)
            for number, (batch, inputs) in enumerate(batches):
                collector.start(_on(batch, device))
                spill.put(number, shell.step(inputs, spill.get(number) if layer else None))
                progress.advance(int(batch.real_BT.sum()) * distributed.world_size())
            for handle in handles:
                handle.remove()
        take_grams(layer)


def _backward(model: PreTrainedModel, hidden_BTH: Tensor, inputs: dict[str, Tensor]) -> None:
    """The backward pass of the next-token loss, summed over the scored tokens."""
    mask = scored(inputs)
    targets_N = inputs["labels"][:, 1:][mask]
    loss, _ = head_loss(
        hidden_BTH[mask], head_of(model), targets_N, LossWeights({"cross_entropy": 1.0})
    )
    loss.backward()  # type: ignore[no-untyped-call]


def _on(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.real_BT.to(device), batch.gram)


SHARE = 3  # a third of the layers is removed; the others are then ranked by their cost


@torch.no_grad()
def removal_order(model: PreTrainedModel, batches: list[dict[str, Tensor]], loss: str) -> Tensor:
    """Position of each layer in a greedy removal [layers], 0 for the first removed layer."""
    layers = list(model.get_submodule("model.layers").children())
    reference = reference_states(model, batches)
    left: list[int] = list(range(len(layers)))
    order: list[int] = []
    rounds = _rounds(len(layers))
    title = f"{loss} without each layer"
    with progress(title, passes_for(len(layers)), "passes") as counter:
        for _ in range(rounds + 1):
            own = {}
            for layer in distributed.share(left):
                _skip(model, layers, {*order, layer})
                own[layer] = mean_loss(model, batches, reference, head_of(model), loss)
                counter.advance(distributed.world_size())
            cost = distributed.merged(own)
            left.sort(key=lambda layer: cost[layer])
            if len(order) < rounds:
                order.append(left.pop(0))
    _skip(model, layers, set())
    place = torch.empty(len(layers))
    place[order + left] = torch.arange(len(layers), dtype=place.dtype)
    return place


def passes_for(layers: int) -> int:
    """Number of passes over the batches for a greedy removal, about layers² / 3.6."""
    return sum(layers - gone for gone in range(_rounds(layers) + 1))


def _rounds(layers: int) -> int:
    return max(1, layers // SHARE)


def _skip(model: PreTrainedModel, layers: list[nn.Module], gone: set[int]) -> None:
    """Replace the layers in `gone` by layers that return their input."""
    stack = [SkippedLayer(layer) if n in gone else layer for n, layer in enumerate(layers)]
    model.base_model.layers = nn.ModuleList(stack)


def count_tokens(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, tokens: int
) -> Tensor:
    """Counts [vocab_size, 1] of each id in about the first `tokens` of the calibration split.

    The documents are those of the blend, each at most once; ids beyond the vocabulary are ignored.
    """
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    seen = 0
    with progress("counting tokens", tokens) as counter:
        for document in blend(BuildContext(data, tokenizer, "calibration", counter=counter)):
            ids = torch.tensor(document.ids, dtype=torch.int64)
            counts_V += torch.bincount(ids[ids < vocab_size], minlength=vocab_size)
            seen += len(ids)
            counter.advance(len(ids))
            if seen >= tokens:
                break
    return counts_V.float()[:, None]
