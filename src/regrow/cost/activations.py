"""Bytes that a student keeps for its backward pass, found without memory and without weights.

The student is built with fake tensors, which have shapes and no data. One forward pass in the
numbers of a distillation then shows each tensor that autograd keeps. The result is exact for all
families without experts; those of a mixture of experts are estimated from the sizes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from regrow.cost.model import ModelSize
from regrow.errors import UserError, reason_of

Numbers = Literal["mixed", "half", "float32"]
"""A student's weights and products: float32 and bfloat16, both bfloat16, or both float32. Weights
that are frozen beside adapters have the numbers of the products."""
PROBED = (1, 2)
"""Numbers of layers of the two models whose difference is one layer."""
VOCABULARY = 8
"""Vocabulary of those models: the embedding keeps only token ids."""


class Activations(NamedTuple):
    """Bytes that the forward pass of one micro-batch keeps."""

    layer: int
    """Bytes of one layer, without the copies of weights."""
    base: int
    """Bytes outside the layers: embedding, final norm, positions and mask."""
    copies: int
    """Bytes of the half-precision copies of one layer's weights, which autocast makes."""


def activations(
    model: ModelSize, batch: int, length: int, rank: int = 0, numbers: Numbers = "mixed"
) -> Activations:
    """The bytes that a student keeps for a micro-batch.

    With a `rank` its weights are frozen beside float32 adapters.
    """
    if "experts" in model.sizes:
        return _estimated(model, batch * length, numbers)
    text = json.dumps(model.config, sort_keys=True, default=str)
    return _probed(text, batch, length, rank, numbers)


def _estimated(model: ModelSize, tokens: int, numbers: Numbers) -> Activations:
    """The same counts for a mixture of experts, whose routing cannot run without data.

    As in a dense layer: 26 · hidden around the two norms and 14 · heads · head_dim in attention;
    then for each chosen expert 8 · its width, and the gathered input and output.
    """
    full = model.sizes
    chosen = int(model.family.value(model.config, "num_experts_per_tok"))
    heads, hidden = full["heads"] * full["head_dim"], full["hidden"]
    experts = chosen * (8 * full["expert_mlp"] + 8 * hidden)
    layer = tokens * (26 * hidden + 14 * heads + experts)
    wider = 2 if numbers == "float32" else 1
    copies = 2 * model.layer_parameters if numbers == "mixed" else 0
    return Activations(wider * layer, wider * tokens * 12 * hidden, copies)


@lru_cache(maxsize=64)
def _probed(text: str, batch: int, length: int, rank: int, numbers: Numbers) -> Activations:
    (one, _), (two, copies) = (
        _kept(json.loads(text), n, batch, length, rank, numbers) for n in PROBED
    )
    return Activations(two - one - copies, one - (two - one), copies)


def _kept(
    config: dict[str, Any], layers: int, batch: int, length: int, rank: int, numbers: Numbers
) -> tuple[int, int]:
    """Bytes that autograd keeps in a model of `layers` layers, and those of one layer's copies."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), _said(config):
        model = _build(config, layers, rank, numbers)
        own = {weight.untyped_storage()._cdata for weight in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        ids = torch.zeros(batch, length, dtype=torch.long)
        positions = torch.arange(length).expand(batch, -1)
        saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with saved, torch.autocast("cpu", torch.bfloat16, enabled=numbers != "float32"):
            model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        total = sum(kept[key].untyped_storage().nbytes() for key in kept.keys() - own)
        matrices = sum(w.numel() for w in model.base_model.layers[0].parameters() if w.ndim == 2)
    return total, 2 * matrices if numbers == "mixed" else 0


@contextmanager
def _said(config: dict[str, Any]) -> Iterator[None]:
    """Raise UserError for a class whose pass cannot be followed without values."""
    try:
        yield
    except Exception as error:  # whatever a model class raises
        raise UserError(
            f"the memory of a step of {config['model_type']} is not known: {reason_of(error)}"
        ) from None


def _build(config: dict[str, Any], layers: int, rank: int, numbers: Numbers) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    lists = {key for key, value in config.items() if isinstance(value, list)}
    fields = {key: value for key, value in config.items() if key not in lists}
    fields |= {"num_hidden_layers": layers, "vocab_size": VOCABULARY}
    fields |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    stock = CONFIG_MAPPING[config["model_type"]].from_dict(fields)
    dtype = torch.bfloat16 if numbers == "half" else torch.float32
    model = AutoModelForCausalLM.from_config(stock, dtype=dtype).train()
    if rank:
        model.requires_grad_(False)
        for layer in model.base_model.layers:
            _adapt(layer, rank)
    return model


class _Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter, as peft computes it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(inputs)
        return result + self.up(self.down(inputs.to(self.down.weight.dtype))) * 2.0


def _adapt(module: nn.Module, rank: int) -> None:
    """Put adapters on all linear layers inside a module."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, _Adapted(child, rank))
        else:
            _adapt(child, rank)
