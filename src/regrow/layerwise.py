"""Run a model with one decoder layer at a time on the device, and the hidden states on disk.

For each layer the model's own forward pass runs, with placeholders for the other layers, so that
masks and position embeddings are computed by the family's own code. B sequences, T tokens, H hidden
channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel

from regrow.checkpoint import Checkpoint
from regrow.checkpoint.checkpoint import experts_option
from regrow.families import Family, in_memory
from regrow.runtime.prefetch import Prefetch

LAYER = "model.layers.{layer}"


class SkippedLayer(nn.Module):
    """A placeholder for a decoder layer that is not in memory; it returns its input."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.__dict__["stood_for"] = real

    def __getattr__(self, name: str) -> Any:
        # The forward pass of a family may read attributes of a layer (attention_type).
        return getattr(self.__dict__["stood_for"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states unchanged."""
        return hidden_states


class Spill:
    """Tensors on disk, by key; the first `put` creates the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, key: str | int, tensor: Tensor) -> None:
        """Write a tensor to disk; it replaces an earlier tensor with this key."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / "new"
        save_file({"tensor": tensor.detach().cpu().contiguous()}, new)
        new.replace(self._path(key))  # an earlier tensor with this key may still be mapped

    def get(self, key: str | int) -> Tensor:
        """The tensor with this key, memory-mapped from disk."""
        return load_file(self._path(key))["tensor"]

    def __contains__(self, key: str | int) -> bool:
        return self._path(key).exists()

    def _path(self, key: str | int) -> Path:
        return self.folder / f"{key}.safetensors"


class LayerByLayer:
    """A model with this `config`, which loads each layer with `read` when it is needed.

    The embedding and the norms outside the layers are shared with `like`, if it is given.
    """

    def __init__(
        self,
        family: Family,
        config: PretrainedConfig,
        names: Iterable[str],
        read: Callable[[str], Tensor],
        dtype: torch.dtype,
        device: torch.device,
        like: LayerByLayer | None = None,
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.family, self.read, self.dtype, self.device = family, read, dtype, device
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, **experts_option(dtype)
            )
        self.model.eval()
        self.names = tuple(names)
        for name in self.names:
            if ".layers." in name or name.startswith("lm_head."):
                continue
            value = self._read(name) if like is None else like.model.get_parameter(name)
            self._set(name, value, True)
        for name, value in self.model.named_buffers():
            self._set(name, value.to(device), as_parameter=False)
        self._config = self.model.config.to_dict()
        self.layers: list[nn.Module] = list(self.model.base_model.layers)
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._hooks: list[RemovableHandle] = []
        self._ahead: Prefetch | None = None

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        family: Family,
        device: torch.device,
        read: Callable[[str], Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> LayerByLayer:
        """The model of a checkpoint; `read` can replace its tensors, `dtype` its compute dtype."""
        config = checkpoint.stock_config()
        read, dtype = read or checkpoint.tensor, dtype or checkpoint.compute_dtype(device)
        return cls(family, config, checkpoint.names(), read, dtype, device)

    @contextmanager
    def resident(self, layer: int, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
        """Keep the weights of one layer on the device; the other layers are placeholders.

        The weights are converted from the stored ones to `dtype`, by default that of the model.
        """
        own = self.layers[layer]
        stack = [SkippedLayer(other) for other in self.layers]
        self.model.base_model.layers = nn.ModuleList([*stack[:layer], own, *stack[layer + 1 :]])
        self._fill(layer, dtype)
        # Registered before all other hooks, so that those see the hidden states from disk.
        handles = [own.register_forward_pre_hook(self._give), own.register_forward_hook(self._take)]
        yield own
        for handle in handles:
            handle.remove()
        own.to("meta")

    def streamed(self, prefetch: bool = False) -> PreTrainedModel:
        """The model for whole passes: a layer's weights are in memory only while it runs.

        With `prefetch` a GPU gets the next layer meanwhile; a thread then calls `read`. After the
        last pass, `end_passes` frees what this takes.
        """
        if self.family.head in self.names:
            self._set(self.family.head, self._read(self.family.head), True)
        else:
            self.model.tie_weights()
        self._ahead = ahead = None
        if prefetch and self.device.type == "cuda":
            self._ahead = ahead = Prefetch(self._on_host, len(self.layers), self.device)
        for number, layer in enumerate(self.layers):
            self._hooks += [
                layer.register_forward_pre_hook(partial(self._before, number, ahead)),
                layer.register_forward_hook(partial(self._after, number, ahead)),
            ]
        model: PreTrainedModel = self.model
        return model

    def end_passes(self) -> None:
        """End the whole passes of `streamed`: nothing reads ahead, and the buffers are freed."""
        for hook in self._hooks:
            hook.remove()
        if self._ahead is not None:
            self._ahead.thread.shutdown(cancel_futures=True)
        self._hooks, self._ahead = [], None

    def _before(self, number: int, ahead: Prefetch | None, layer: nn.Module, inputs: Any) -> None:
        if ahead is None:
            self._fill(number)
            return
        for name, value in ahead.take(number).items():
            self._set(name, value, True)

    def _after(
        self, number: int, ahead: Prefetch | None, layer: nn.Module, inputs: Any, output: Tensor
    ) -> None:
        layer.to("meta")
        if ahead is not None:
            ahead.release(number)

    def _fill(self, layer: int, dtype: torch.dtype | None = None) -> None:
        """Load a layer's weights onto the device."""
        read = partial(self._read, dtype=dtype)
        for name, value in in_memory(self.family, self._config, layer, read):
            self._set(name, value, True)

    def _on_host(self, layer: int) -> dict[str, Tensor]:
        """A layer's weights in the host's memory; they may be views of a mapped file."""
        return dict(
            in_memory(self.family, self._config, layer, lambda name: self.read(name).to(self.dtype))
        )

    def step(self, inputs: dict[str, Tensor], hidden_BTH: Tensor | None) -> Tensor:
        """Output [B, T, H] of the layer in memory; without `hidden_BTH`, for the embedding."""
        self._input = None if hidden_BTH is None else hidden_BTH.to(self.device)
        moved = {key: inputs[key].to(self.device) for key in ("input_ids", "position_ids")}
        self.model.base_model(**moved, use_cache=False)
        assert self._output is not None
        return self._output

    def _give(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self._input is None else (self._input, *inputs[1:])

    def _take(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._output = output

    def _read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        # Copy: a mapped tensor keeps its whole file mapped, and a layer may be in several files.
        return self.read(name).to(self.device, dtype or self.dtype, copy=True)

    def _set(self, name: str, value: Tensor, as_parameter: bool) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if as_parameter:
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(leaf, value, persistent=False)
