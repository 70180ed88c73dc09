"""Learning rates of parts of a model, as shares of the optimizer's learning rate."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from regrow import stage_dir
from regrow.checkpoint import Checkpoint

SHARE = 5e-4
"""The peak learning rate as a share of the size of a weight."""
FIXED = 1e-4
"""The peak learning rate where there are no trained weights to follow."""
RANDOM_WEIGHTS = "random_weights"
"""The entry of a manifest, true, of a model whose weights are those of a new model."""
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def is_attention(name: str, parameter: nn.Parameter) -> bool:
    """Whether a layer's parameter belongs to attention, or is a vector (a norm or a bias).

    All others are matrices of MLPs, experts and routers. transformers calls the modules self_attn,
    attn, linear_attn or attention.
    """
    modules = name.split(".")[:-1]
    return parameter.ndim < 2 or any("attn" in each or "attention" in each for each in modules)


def has_random_weights(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's manifest says that its weights have not been trained."""
    return bool((stage_dir.read(checkpoint.folder) or {}).get(RANDOM_WEIGHTS))


def usual_rate(student: Checkpoint) -> float:
    """5e-4 times the root mean square of the matrices in the middle layer, in two digits.

    The weights of some families are several times as large as those of others, and a step of AdamW
    changes each by about the learning rate. Random weights are smaller than trained ones, and this
    rate is too low for them.
    """
    layers = {name: int(found[1]) for name in student.names() if (found := LAYER.search(name))}
    middle = (max(layers.values(), default=0) + 1) // 2
    total, count = 0.0, 0
    for name, layer in layers.items():
        if layer == middle and len(student.meta(name).shape) > 1:
            weight = student.tensor(name).float()
            total += float(weight.square().sum(dtype=torch.float64))
            count += int(weight.count_nonzero())  # zeros of a sparse student are no small weights
    return float(f"{SHARE * (total / count) ** 0.5:.1e}") if total > 0 else FIXED


def scale_rates(
    optimizer: torch.optim.Optimizer, model: PreTrainedModel, attention: float, embeddings: float
) -> None:
    """Split the groups of a new optimizer into groups with rates of their own.

    Matrices of MLPs and parameters outside `model` keep the optimizer's rate. `attention` is the
    share of it for attention and vectors, `embeddings` that for the embedding and the head.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    in_ends = {id(p) for module in ends if module is not None for p in module.parameters()}
    rates = {
        id(p): embeddings if id(p) in in_ends else attention if is_attention(name, p) else 1.0
        for name, p in model.named_parameters()
    }
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            by_rate[rates.get(id(parameter), 1.0)].append(parameter)
        for rate, parameters in by_rate.items():
            groups.append({**group, "params": parameters, "lr": group["lr"] * rate})
    optimizer.param_groups[:] = groups
