"""The memory that a distillation will take on each device, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from regrow.config import Options
from regrow.cost.memory import Placement, Sharding, TrainingMemory, TrainingSetup, training_memory
from regrow.cost.model import ModelSize
from regrow.data.config import DataConfig
from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.runtime.memory import device_bytes
from regrow.runtime.precision import half
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.setup import budget_of
from regrow.stages.distill.teacher import teacher_placement
from regrow.training import optimizers, sharding

SHOWN = 4
"""Settings that are shown at most."""
CONTEXT = {"cuda": 1.0e9, "cpu": 0.7e9}
"""Bytes beside the tensors: CUDA's context and gaps; imports of a process."""

NEW_RUN = {"--cache", "--teacher-dtype", "--sharding", "--adapter", "--optimizer"}
"""Flags with which a run starts anew: its checkpoints are of another kind, or teach otherwise."""

Total = Callable[[TrainingSetup], float]
"""The bytes on a device with a setting."""


def setup_of(config: DistillConfig, data: DataConfig, options: Options) -> TrainingSetup:
    """How a distillation uses its devices, for `cost.memory`."""
    _, micro, accumulation = budget_of(config, data, options)
    placement: Placement = teacher_placement(config, options)
    devices = distributed.world_size()
    kind: Sharding = "ddp" if devices > 1 else "none"
    if sharding.is_sharded(options):
        kind = "hsdp" if options.sharding == "hsdp" else "fsdp"
    device = options.torch_device()
    compute = half(device).itemsize
    setup = TrainingSetup(
        batch=micro,
        length=data.sequence_length,
        accumulation=accumulation,
        adapter_rank=0 if config.adapter == "none" else config.lora_rank,
        frozen_bytes=0.6 if config.adapter == "qlora" else float(compute),
        frozen_layers=config.freeze_layers,
        checkpointing=options.gradient_checkpointing,
        teacher="cache" if config.cache else placement,
        sharding=kind,
        devices=devices,
        node=distributed.local_world_size(),
        cpu_offload=sharding.offloads(options),
        device=device.type,
        compute_bytes=compute,
    )
    return _with(setup, config.optimizer)


def memory_lines(
    student: dict[str, Any],
    teachers: list[dict[str, Any]],
    config: DistillConfig,
    data: DataConfig,
    options: Options,
    at_most: bool = False,
) -> list[str]:
    """The expected memory of each device, whether it is there, and what would make it fit.

    `student` and `teachers` are configs; `at_most`: the student will be smaller. No line for a
    model whose family has no table, or whose pass cannot be followed.
    """
    models = ModelSize(student), [ModelSize(each) for each in teachers]
    setup, device = setup_of(config, data, options), options.torch_device()
    try:
        memory = _memory(*models, setup)
    except UserError:  # a family without a table, or a class whose pass cannot be followed
        return []
    beside = CONTEXT.get(device.type, 0.0)

    def total(setup: TrainingSetup) -> float:
        return _memory(*models, setup).total + beside

    there = device_bytes(device)
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])
    words = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts if size > 5e6)
    lines = [
        f"  memory of each device: {'at most ' * at_most}{total(setup) / 1e9:.2f} GB ({words}, "
        f"the process itself {beside / 1e9:.2f})"
    ]
    what = "has" if device.type == "cuda" else "can give"
    if total(setup) <= there:
        return [*lines, f"  it fits: this {device.type} {what} {there / 1e9:.2f} GB"]
    lines.append(f"  it does not fit: this {device.type} {what} {there / 1e9:.2f} GB")
    return lines + _fitting(setup, total, there, device.type)


def advice(
    student: dict[str, Any],
    teachers: list[dict[str, Any]],
    config: DistillConfig,
    data: DataConfig,
    options: Options,
) -> str:
    """What takes less memory and continues a run: options, which are in no checkpoint.

    `student` and `teachers` are configs.
    """
    setup = setup_of(config, data, options)
    models = ModelSize(student), [ModelSize(each) for each in teachers]

    def total(setup: TrainingSetup) -> float:
        return _memory(*models, setup).total

    try:
        now, sizes = total(setup), [(name, total(s)) for name, s in changes(setup, total)]
    except UserError:  # a family without a table
        return "give --batch-size 1 or --gradient-checkpointing"
    new = NEW_RUN - ({"--sharding"} if setup.shards > 1 else set())  # shards stay shards
    kept = [(name, size) for name, size in sizes if not set(name.split()) & new]
    less = [f"{name} ({size / 1e9:.2f} GB)" for name, size in kept if size < 0.98 * now]
    needed = f"a step needs about {now / 1e9:.2f} GB on each device"
    return needed + (f"; give {' or '.join(less[:SHOWN])}" if less else "")


def changes(setup: TrainingSetup, total: Total) -> list[tuple[str, TrainingSetup]]:
    """Settings with their flags, first those that change no result.

    The later ones come together with the settings among those that take the least memory: a
    smaller batch can take more, since gradients then stay between micro-batches.
    """
    found = _same_result(setup)
    flags, base = min([("", setup), *found], key=lambda each: total(each[1]))

    def add(flag: str, changed: TrainingSetup) -> None:
        found.append((f"{flags} {flag}".strip(), changed))

    if setup.teacher == "whole":
        for flag, place in TEACHERS.items():
            add(flag, replace(base, teacher=place))
    if not setup.adapter_rank and not setup.cpu_offload:
        for name in SMALLER_OPTIMIZERS if setup.shards == 1 else ("adamw_8bit",):
            found.append((f"--optimizer {name}", _with(setup, name)))
            if flags:
                add(f"--optimizer {name}", _with(base, name))
    place = "shares" if setup.teacher == "node_shares" else setup.teacher
    if setup.sharding == "hsdp":
        add("--sharding fsdp", replace(base, sharding="fsdp", teacher=place))
    plain = _with(base, "adamw")  # what follows does not work with all of the others
    flags += " --optimizer adamw" if plain != base else ""
    if setup.shards > 1 and not setup.cpu_offload:
        shards = replace(plain, sharding="fsdp", teacher=place, cpu_offload=True)
        add("--sharding fsdp_offload", shards)
    if setup.sharding == "none":
        place = "shares" if setup.teacher == "whole" else setup.teacher
        in_4_bits = bool(setup.adapter_rank) and setup.frozen_bytes < 2  # not with shards
        for devices in (2, 4, 8) if place in ("shares", "cache") and not in_4_bits else ():
            shards = replace(plain, sharding="fsdp", devices=devices, teacher=place)
            add(f"--sharding fsdp on {devices} GPUs", shards)
            add(f"--sharding fsdp_offload on {devices} GPUs", replace(shards, cpu_offload=True))
    if not setup.adapter_rank:
        add("--adapter lora", replace(plain, adapter_rank=16))
    return found


def _same_result(setup: TrainingSetup) -> list[tuple[str, TrainingSetup]]:
    """Smaller micro-batches, recomputed activations, and both."""
    found, batch = [], setup.batch // 2
    while batch >= 1:
        accumulation = setup.accumulation * (setup.batch // batch)
        smaller = replace(setup, batch=batch, accumulation=accumulation)
        found.append((f"--batch-size {batch}", smaller))
        batch //= 2
    if not setup.checkpointing:
        again = "--gradient-checkpointing"
        found.append((again, replace(setup, checkpointing=True)))
        if found[:-1]:
            flags, smallest = found[-2]
            found.append((f"{flags} {again}", replace(smallest, checkpointing=True)))
    return found


def _with(setup: TrainingSetup, optimizer: str) -> TrainingSetup:
    """The setup with an optimizer."""
    kind = optimizers.KINDS[optimizer]
    return replace(setup, master_bytes=kind.dtype.itemsize, moment_bytes=kind.moment_bytes)


SMALLER_OPTIMIZERS = ("adamw_8bit", "adamw_bf16")
"""Optimizers that take less memory than AdamW in float32, on a GPU."""
TEACHERS: dict[str, Placement] = {
    "--cache (of regrow cache)": "cache",
    "--teacher-dtype int8": "int8",
    "--offload-teacher": "disk",
}
"""Flags that place the teacher elsewhere."""


def _memory(student: ModelSize, teachers: list[ModelSize], setup: TrainingSetup) -> TrainingMemory:
    """The memory of a step; further teachers add their weights."""
    memory = training_memory(student, teachers[0] if teachers else None, setup)
    if len(teachers) < 2:
        return memory
    weights = sum(2.0 * each.parameters for each in teachers[1:])
    return replace(memory, parts={**memory.parts, "further teachers": weights})


def _fitting(setup: TrainingSetup, total: Total, there: float, device: str) -> list[str]:
    """The first settings that fit, or the one that comes nearest."""
    usable = [
        (name, total(each))
        for name, each in changes(setup, total)
        if device == "cuda" or not ("fsdp" in name or "--optimizer" in name)
    ]
    if not usable:
        return []
    fitting = [(name, size) for name, size in usable if size <= there]
    if fitting:
        return ["  these settings would fit:"] + [
            f"    {name}: {size / 1e9:.2f} GB" for name, size in fitting[:SHOWN]
        ]
    name, size = min(usable, key=lambda each: each[1])
    return [f"  no setting here makes it fit; the least is {name}: {size / 1e9:.2f} GB"]
