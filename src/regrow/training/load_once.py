"""Loads the weights of a model that is sharded in process 0 only.

The other processes have the same model with empty memory, which the system does not provide before
it is written to. After the model is sharded, process 0 sends its weights, one tensor at a time, and
each process keeps its shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.runtime import distributed
from regrow.training.sharding import fill


def load_once(
    load: Callable[[], PreTrainedModel], skeleton: Callable[[], PreTrainedModel]
) -> PreTrainedModel:
    """The model of `load()` in process 0; in the others that of `skeleton()`, in empty memory.

    `skeleton` gives the same model on the meta device. Its parameters get the dtypes of process 0,
    and its buffers, which are small and never sharded, also the values.
    """
    model = load() if distributed.is_main() else skeleton()
    dtypes, buffers = distributed.from_first(lambda: _described(model))
    if distributed.is_main():
        return model
    named = dict(model.named_parameters())
    assert named.keys() == dtypes.keys(), "process 0 has another model"
    for name, parameter in named.items():
        parameter.data = parameter.data.to(dtypes[name])
    model.to_empty(device="cpu").tie_weights()
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer
    return model


def weights_of(model: PreTrainedModel) -> list[Tensor]:
    """The weights that process 0 will send, before the model is sharded; [] in the others."""
    return [each.data for each in model.parameters()] if distributed.is_main() else []


@torch.no_grad()
def send(weights: Sequence[Tensor], model: PreTrainedModel, device: torch.device) -> None:
    """Fill the parameters of a sharded model with the weights of process 0, by way of `device`.

    All processes call it. A parameter that is not sharded gets the whole weight.
    """
    import torch.distributed as dist

    for number, parameter in enumerate(model.parameters()):
        if distributed.is_main():
            whole = weights[number].to(device, parameter.dtype).contiguous()
        else:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        dist.broadcast(whole, src=0)
        fill(parameter, whole)


def _described(model: PreTrainedModel) -> tuple[dict[str, torch.dtype], dict[str, Tensor]]:
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    return dtypes, dict(model.named_buffers())
