"""Shards student, optimizer and teacher over GPUs with FSDP2 or a DeepSpeed config."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from regrow.config import Options
from regrow.errors import UserError
from regrow.runtime import distributed

OPTIMIZER = "optimizer_0"
"""The folder with the optimizer's shards in a checkpoint of a sharded run."""
WEIGHTS = "pytorch_model_fsdp_0"
"""The folder with the shards of the weights there."""


def is_sharded(options: Options) -> bool:
    """Whether `sharding` or the config of `accelerate launch` requests sharding."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return options.sharding != "none" or launched


def offloads(options: Options) -> bool:
    """Whether the student's shards and their optimizer are kept in the host's memory."""
    launched = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
    return options.sharding == "fsdp_offload" or (is_sharded(options) and launched)


def name(options: Options) -> str:
    """The sharding as messages call it."""
    return f"sharding {'fsdp' if options.sharding == 'none' else options.sharding}"


def require(options: Options, device: torch.device, adapter: str) -> None:
    """Raise UserError for a sharding or a DeepSpeed config that is not supported here."""
    if options.deepspeed is not None:
        _require_deepspeed(Path(options.deepspeed), is_sharded(options))
    if not is_sharded(options):
        return
    if distributed.world_size() < 2:
        raise UserError(
            f"{name(options)} needs several processes: start with torchrun, or leave it out"
        )
    if device.type == "cpu":
        raise UserError(
            f"{name(options)} needs GPUs (accelerate shards nothing on the CPU): leave it out"
        )
    if adapter == "qlora":  # accelerate does not shard weights that are stored in 4 bits
        raise UserError(f"{name(options)} with adapter qlora: not supported; set adapter to lora")
    if options.sharding == "hsdp":
        _require_nodes()


def training_fields(options: Options) -> dict[str, Any]:
    """The fields of TrainingArguments for sharding."""
    fields: dict[str, Any] = {}
    if options.deepspeed is not None:
        fields["deepspeed"] = options.deepspeed
    if is_sharded(options):
        config: dict[str, Any] = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
        if offloads(options):
            config["cpu_offload"] = True
        fields |= {"fsdp": True, "fsdp_config": config}
        if options.sharding == "hsdp":
            from accelerate import ParallelismConfig

            shards = distributed.local_world_size()
            copies = distributed.world_size() // shards
            fields["parallelism_config"] = ParallelismConfig(
                dp_replicate_size=copies, dp_shard_size=shards
            )
        # Otherwise every device would keep the gradients of all layers between the micro-batches.
        fields["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return fields


def keep_precision(arguments: TrainingArguments) -> None:
    """Reduce gradients in float32 and do not cast outputs; accelerate would use bfloat16 for both.

    The loss is an output, and a cast would round it to 8 bits of precision.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    compute = torch.bfloat16 if arguments.bf16 else None
    arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32
    )


def share(model: PreTrainedModel, device: torch.device, in_node: bool = False) -> None:
    """Shard a frozen model's layers over the processes; a layer is gathered only while it runs.

    With `in_node` each node has all shards, and layers are gathered inside it.
    Embedding, final norm and head are not sharded, because they are read outside the forward pass.
    Layers move to the device one at a time, so the whole model is never on the device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shards = distributed.local_world_size() if in_node else distributed.world_size()
    shape = (distributed.world_size() // shards, shards)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copies", "shards"))["shards"]
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    rest: set[nn.Parameter] = set(model.parameters()) - inside
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.base_model, mesh=mesh, ignored_params=rest)
    for parameter in rest:
        parameter.data = parameter.data.to(device)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or a tensor that is not sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, or a tensor that is not sharded. All ranks must call it."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    shard: Any = tensor.to(tensor.device_mesh.device_type)
    whole: Tensor = shard.full_tensor()
    return whole


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a parameter, or its part into this process's shard."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        # Without a source rank each process cuts its shard out of its own copy.
        shards = distribute_tensor(
            whole.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None
        )
        parameter.to_local().copy_(shards.to_local())
    else:
        parameter.copy_(whole)


def load_shards(model: PreTrainedModel, checkpoint: Path) -> None:
    """Fill a whole model with the shards of a checkpoint; one process does it without the others.

    The names, shapes and dtypes must be those of the model that was sharded.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(checkpoint / WEIGHTS)
    with distributed.hidden_group():
        dcp.load({"model": model.state_dict()}, storage_reader=reader)


def require_same(checkpoint: Path, sharded: bool) -> None:
    """Raise UserError if a sharded run would continue an unsharded one, or the reverse."""
    if (checkpoint / OPTIMIZER).exists() != sharded:
        was, now = ("none", "fsdp") if sharded else ("fsdp", "none")
        raise UserError(
            f"{checkpoint} was written with sharding {was} and cannot continue with {now}: "
            f"give --sharding {was}, or another --out"
        )


def _require_nodes() -> None:
    from transformers.utils import is_accelerate_available

    devices, in_node = distributed.world_size(), distributed.local_world_size()
    if in_node < 2 or devices % in_node or devices == in_node:
        raise UserError(
            "sharding hsdp needs several nodes with two or more processes each, the same number on "
            f"all (there are {devices} processes, {in_node} of them on this node): take fsdp"
        )
    if not is_accelerate_available("1.12.0"):
        raise UserError("sharding hsdp needs accelerate 1.12 or later: upgrade it, or take fsdp")


def _require_deepspeed(path: Path, sharded: bool) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed {path} cannot be read as JSON: {error}") from None
    stage = config.get("zero_optimization", {}).get("stage", 0) if isinstance(config, dict) else 3
    if stage not in (0, 1, 2):
        raise UserError(
            f"deepspeed {path}: ZeRO stage {stage} shards the output head, and the loss needs all "
            "of it; allowed are stages 0, 1, 2, or --sharding fsdp without DeepSpeed"
        )
    if sharded:
        raise UserError("sharding fsdp and deepspeed exclude each other: give one of them")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("deepspeed is not installed: pip install deepspeed, or leave it out")
