"""Two orders of one pass: the whole model resident, or one decoder layer at a time.

Both give the same numbers. The layer-major order keeps one layer's weights on the device and
spills the hidden states of all blocks to disk, for models larger than the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from regrow.checkpoint import Checkpoint
from regrow.layerwise import LayerByLayer, Spill
from regrow.progress import Progress
from regrow.stages.profile.collect import Batch, Collector
from regrow.training.head import head_loss, head_of
from regrow.training.mix import Mix
from regrow.training.teacher import final_hidden, scored

Batches = list[tuple[Batch, dict[str, Tensor]]]
"""Per batch: what the hooks must know, and the model's input_ids, position_ids and labels."""
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
    """Run every batch through the whole model, loaded on `device`; back, if a statistic asks."""
    model = checkpoint.model(dtype, device).requires_grad_(False)
    if collector.backward:
        model.enable_input_require_grads()
    run_through(model, batches, collector, progress)
    for layer in range(model.config.num_hidden_layers):
        take_grams(layer)


def run_through(
    model: PreTrainedModel, batches: Batches, collector: Collector, progress: Progress
) -> None:
    """One pass of all batches through a resident model, with the collector's hooks on it."""
    handles = collector.attach(model, range(model.config.num_hidden_layers), final=True)
    for batch, inputs in batches:
        collector.start(_on(batch, model.device))
        moved = {key: value.to(model.device) for key, value in inputs.items()}
        with torch.set_grad_enabled(collector.backward):
            hidden_BTH = final_hidden(model, moved)
            if collector.backward:
                _backward(model, hidden_BTH, moved)
        progress.advance(int(batch.real_BT.sum()))
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
    """Run all batches through one decoder layer, then the next; hidden states wait on disk."""
    config = AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    given = (collector.family, config, checkpoint.names(), checkpoint.tensor)
    shell = LayerByLayer(*given, dtype, device)
    last = len(shell.layers) - 1
    for layer in range(last + 1):
        with shell.resident(layer):
            handles = collector.attach(shell.model, [layer], final=layer == last)
            for number, (batch, inputs) in enumerate(batches):
                collector.start(_on(batch, device))
                spill.put(number, shell.step(inputs, spill.get(number) if layer else None))
                progress.advance(int(batch.real_BT.sum()))
            for handle in handles:
                handle.remove()
        take_grams(layer)


def _backward(model: PreTrainedModel, hidden_BTH: Tensor, inputs: dict[str, Tensor]) -> None:
    """Send back the gradient of the next-token loss, summed over the scored tokens."""
    mask = scored(inputs)
    targets_N = inputs["labels"][:, 1:][mask]
    loss, _ = head_loss(hidden_BTH[mask], head_of(model), targets_N, Mix({"cross_entropy": 1.0}))
    loss.backward()  # type: ignore[no-untyped-call]


def _on(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.real_BT.to(device), batch.gram)
