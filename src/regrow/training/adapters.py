"""Adds low-rank adapters to a student's frozen weights, and merges them into plain weights.

W = W₀ + (alpha / rank) · B · A, where only A [rank, in] and B [out, rank] are trained. This is LoRA
(Hu et al., 2021, arXiv:2106.09685), and with W₀ in 4 bits it is QLoRA (Dettmers et al., 2023,
arXiv:2305.14314).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError, nearest
from regrow.runtime.precision import float32_at_least
from regrow.training import sharding

NAME = "default"
PREFIX = "base_model.model."
"""The prefix of module names in peft's files."""


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapters on the linear projections `targets` of the layers from `first_layer` on."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    quantized: bool = False
    """Whether the frozen weights are stored in 4 bits (NF4)."""
    first_layer: int = 0

    def model(self, base: Checkpoint, device: torch.device, seed: int) -> PreTrainedModel:
        """The stock model with frozen weights in the compute dtype, and new float32 adapters.

        A is drawn with `seed` and B is zero, so the outputs are the same as without the adapters.
        """
        dtype = base.compute_dtype(device)
        model = _in_4_bits(base, dtype, device) if self.quantized else base.model(dtype)
        torch.manual_seed(seed)
        return self.attach(model)

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with new adapters; it may be on the meta device."""
        from peft import LoraConfig

        layers = range(self.first_layer, model.config.num_hidden_layers)
        model.add_adapter(
            LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,  # type: ignore[arg-type]
                target_modules=list(self.targets),
                layers_to_transform=list(layers) if self.first_layer else None,
            ),
            NAME,
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(float32_at_least(parameter.dtype))
        return model.eval()

    def parameters(self, model: PreTrainedModel) -> int:
        """The number of trained parameters on `model`, which may be on the meta device."""
        wide = sum(
            layer.in_features + layer.out_features
            for name, layer in _linear(model)
            if name.split(".")[-1] in self.targets and _layer_of(name) >= self.first_layer
        )
        return self.rank * wide


def targets_in(model: PreTrainedModel, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of the linear projections in a model's layers: all, or the `wanted` ones.

    Routers and stacked experts are not linear layers and get no adapters. Raises UserError for an
    unknown name. `model` may be on the meta device.
    """
    there = tuple(dict.fromkeys(name.split(".")[-1] for name, _ in _linear(model)))
    for name in wanted:
        if name not in there:
            raise UserError(
                f"lora_targets {name!r} is not a linear projection of this model's layers"
                f"{nearest(name, there)}; there are: {', '.join(there)}"
            )
    return tuple(name for name in there if not wanted or name in wanted)


def check_rank(model: PreTrainedModel, targets: Sequence[str], rank: int) -> None:
    """Raise UserError for a rank above the smallest side of a projection that gets an adapter."""
    for name, module in _linear(model):
        side = min(module.weight.shape)
        if name.split(".")[-1] in targets and rank > side:
            raise UserError(
                f"lora_rank {rank}: the smaller side of {name} is {side}; give at most {side}"
            )


def require(kind: str, device: torch.device) -> None:
    """Raise UserError if a package or a device is missing that this kind of adapters needs."""
    packages = {"lora": ("peft",), "qlora": ("peft", "bitsandbytes")}[kind]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"adapter {kind} needs {package}, which is not installed: "
                f"pip install 'regrow[{kind}]', or set adapter to none"
            )
    if kind == "qlora" and device.type != "cuda":
        raise UserError(f"adapter qlora needs a CUDA GPU, not {device.type}: set adapter to lora")


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether the model has adapters."""
    return bool(model._hf_peft_config_loaded)


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Load the adapters that `model.save_pretrained` wrote to a folder; all must match.

    The model's adapters may be sharded over the processes.
    """
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    adapters = {
        PREFIX + name.replace(f".{NAME}.", "."): parameter
        for name, parameter in model.named_parameters()
        if f".{NAME}." in name
    }
    assert tensors.keys() == adapters.keys()
    for name, parameter in adapters.items():
        sharding.fill(parameter, tensors[name])


@torch.no_grad()
def merge_into(plain: PreTrainedModel, trained: PreTrainedModel) -> None:
    """Write W₀ + (alpha / rank) · B · A into the layers of `plain` that have adapters in `trained`.

    The sum is in float32 or float64 and is rounded once, to the dtype of `plain`. W₀ is the weight
    in `plain`, because the frozen one in `trained` may be rounded to the dtype to compute in. If
    the frozen weight is in 4 bits, W₀ is that weight, dequantized.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    for name, layer in trained.named_modules():
        if isinstance(layer, LoraLayer):
            adapted: Any = layer
            target = plain.get_submodule(name).weight
            assert isinstance(target, nn.Parameter)
            frozen, delta = adapted.get_base_layer(), adapted.get_delta_weight(NAME)
            in_4_bits = not frozen.weight.is_floating_point()
            base = dequantize_module_weight(frozen) if in_4_bits else target
            wide = float32_at_least(base.dtype)
            target.copy_(base.to(delta.device, wide) + delta.to(wide))


def _in_4_bits(base: Checkpoint, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    base.refuse_multimodal("adapter qlora does not open it; take lora")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    options: dict[str, Any] = {"quantization_config": four_bits, "device_map": {"": device}}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(base.folder), dtype=dtype, local_files_only=True, use_safetensors=True, **options
        )
    except (ImportError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"bitsandbytes does not support 4-bit weights on {device}: {reason}"
        ) from None
    return model


def _linear(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """Name and module of each linear projection inside a decoder layer."""
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and _layer_of(name) >= 0
    ]


def _layer_of(name: str) -> int:
    """The number of the decoder layer that contains a module; −1 for none."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else -1
