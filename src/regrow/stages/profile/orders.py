"""Two orders of one pass: the whole model resident, or one decoder layer at a time.

Both give the same numbers. The layer-major order keeps one layer's weights on the device and
spills the hidden states of all blocks to disk, for models larger than the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow import families
from regrow.checkpoint import Checkpoint, experts_option
from regrow.families import Family
from regrow.progress import Progress
from regrow.stages.profile.collect import Batch, Collector
from regrow.training.head import Mix, head_loss, head_of
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
    layers = range(model.config.num_hidden_layers)
    handles = collector.attach(model, layers, final=True)
    for batch, inputs in batches:
        collector.start(_on(batch, device))
        moved = {key: value.to(device) for key, value in inputs.items()}
        with torch.set_grad_enabled(collector.backward):
            hidden_BTH = final_hidden(model, moved)
            if collector.backward:
                _backward(model, hidden_BTH, moved)
        progress.advance(int(batch.real_BT.sum()))
    for handle in handles:
        handle.remove()
    for layer in layers:
        take_grams(layer)


@torch.no_grad()
def layer_major(
    checkpoint: Checkpoint,
    batches: Batches,
    collector: Collector,
    take_grams: TakeGrams,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    spill: Path,
) -> None:
    """Run all batches through one decoder layer, then the next; hidden states wait on disk.

    The model's own forward runs each time over stand-ins for its layers, so that masks and
    position embeddings are made as the family makes them.
    """
    shell = _Shell(checkpoint, collector.family, dtype, device)
    spill.mkdir(parents=True, exist_ok=True)
    last = len(shell.layers) - 1
    for layer in range(last + 1):
        with shell.resident(layer):
            handles = collector.attach(shell.model, [layer], final=layer == last)
            for number, (batch, inputs) in enumerate(batches):
                collector.start(_on(batch, device))
                shell.step(inputs, spill / f"{number}.safetensors")
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


class Pass(nn.Module):
    """Stands in for a decoder layer that is not there: hands hidden states on."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.__dict__["stood_for"] = real

    def __getattr__(self, name: str) -> Any:
        # The families' forwards may read attributes of a layer (attention_type).
        return getattr(self.__dict__["stood_for"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same hidden states."""
        return hidden_states


class _Shell:
    """A model whose decoder layers stay on the meta device except the one that is resident."""

    def __init__(
        self, checkpoint: Checkpoint, family: Family, dtype: torch.dtype, device: torch.device
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.checkpoint, self.family = checkpoint, family
        self.dtype, self.device = dtype, device
        config = AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, **experts_option(dtype)
            )
        self.model.eval()
        for name in checkpoint.names():
            if ".layers." not in name and not name.startswith("lm_head."):
                self._set(name, self._read(name), True)
        for name, value in self.model.named_buffers():
            self._set(name, value.to(device), as_parameter=False)
        self.layers = list(self.model.base_model.layers)
        self.spill_file = Path()

    @contextmanager
    def resident(self, layer: int) -> Iterator[None]:
        """Have the weights of one layer on the device, the others passing hidden states on."""
        own = self.layers[layer]
        stack = [Pass(other) for other in self.layers]
        self.model.base_model.layers = nn.ModuleList([*stack[:layer], own, *stack[layer + 1 :]])
        config = self.checkpoint.config
        for name, value in families.in_memory(self.family, config, layer, self._read):
            self._set(name, value, True)
        # Registered before the collector's hooks, so those see the hidden states loaded here.
        handles = [own.register_forward_hook(self._store)]
        if layer > 0:
            handles.append(own.register_forward_pre_hook(self._load))
        yield
        for handle in handles:
            handle.remove()
        own.to("meta")

    def step(self, inputs: dict[str, Tensor], spill_file: Path) -> None:
        """Run one batch through the resident layer, from and to its spill file."""
        self.spill_file = spill_file
        moved = {key: inputs[key].to(self.device) for key in ("input_ids", "position_ids")}
        self.model.base_model(**moved, use_cache=False)

    def _load(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (load_file(self.spill_file)["hidden"].to(self.device), *inputs[1:])

    def _store(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        save_file({"hidden": output.contiguous()}, self.spill_file)

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name).to(self.device, self.dtype)

    def _set(self, name: str, value: Tensor, as_parameter: bool) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if as_parameter:
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(leaf, value, persistent=False)
