"""Memory of a training step on one device, from the configs of student and teacher alone.

A step is largest at one of three moments: while the teacher runs, when the student's forward pass
and the loss end (`loss`), or when the backward pass ends and all gradients exist (`update`). The
bytes are those of tensors. A CUDA device needs about 1 GB more, for its context and for gaps in the
allocator; a process on a CPU needs what its imports take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from regrow.cost.activations import Activations, Numbers, activations
from regrow.cost.model import ModelSize
from regrow.runtime.chunks import head_chunk

Sharding = Literal["none", "ddp", "fsdp", "hsdp"]
"""One process, copies on all devices, shards over all devices, or shards inside a node."""
Placement = Literal["whole", "int8", "shares", "node_shares", "disk", "cache"]
"""Where the teacher's weights are; `cache`: only its head, beside stored outputs."""
NODE = 8
"""Devices of a node, where it is not known: the shards of `hsdp`."""
GATHERED = 2
"""Layers that FSDP2 holds whole at once: the one that runs and the one that is fetched."""


@dataclass(frozen=True)
class TrainingSetup:
    """How a distillation uses its devices; what changes no memory is left out."""

    batch: int
    """Sequences in a micro-batch on one device."""
    length: int
    """Tokens in a sequence."""
    accumulation: int = 1
    """Micro-batches of a step on one device."""
    adapter_rank: int = 0
    """Rank of LoRA adapters on all linear layers; 0 trains all weights."""
    frozen_bytes: float = 2.0
    """Bytes of a frozen weight beside adapters: 2, or about 0.6 in 4 bits."""
    frozen_layers: int = 0
    """First layers that are not trained, nor is the embedding."""
    checkpointing: bool = False
    """Whether activations are recomputed in the backward pass."""
    teacher: Placement = "whole"
    sharding: Sharding = "none"
    devices: int = 1
    node: int = NODE
    """Devices of a node."""
    cpu_offload: bool = False
    """Whether weights, gradients and moments lie in the host's memory (FSDP's CPU offload)."""
    master_bytes: float = 4.0
    """Bytes of a trained weight, and of its gradient: 4, or 2 with stochastic rounding."""
    moment_bytes: float = 8.0
    """Bytes of the optimizer's moments for a weight: 8 for AdamW, about 2 for AdamW in 8 bits."""
    device: str = "cpu"
    """The type of the device: a GPU takes more memory where that saves time."""
    compute_bytes: int = 2
    """Bytes of a number in products: 2, or 4 on a device that computes in float32."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch * self.length

    @property
    def numbers(self) -> Numbers:
        """The numbers of the student's weights and of the products."""
        stored = self.compute_bytes if self.adapter_rank else self.master_bytes
        if stored < 4:
            return "half"
        return "mixed" if self.compute_bytes < 4 else "float32"

    @property
    def copies(self) -> bool:
        """Whether autocast copies the trained weights in half precision."""
        return self.numbers == "mixed"

    @property
    def shards(self) -> int:
        """Parts into which the student's weights are divided."""
        return {"fsdp": self.devices, "hsdp": min(self.node, self.devices)}.get(self.sharding, 1)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device at the largest moment of a step, by what they are for."""

    parts: dict[str, float]
    moment: str
    """`teacher`, `loss` or `update`."""
    host: float = 0.0
    """Bytes in the host's memory for each device, with CPU offload."""

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())


def training_memory(
    student: ModelSize, teacher: ModelSize | None, setup: TrainingSetup
) -> TrainingMemory:
    """The memory of a training step on each device; without a teacher: next-token training."""
    kept = activations(student, setup.batch, setup.length, setup.adapter_rank, setup.numbers)
    state, host = _state(student, setup)
    state["teacher"] = 0.0 if teacher is None else _teacher_bytes(teacher, setup)
    gradients = setup.master_bytes * _trained(student, setup) / setup.shards
    if setup.cpu_offload:
        gradients = 0.0
    before = gradients if setup.accumulation > 1 else 0.0
    if setup.sharding == "ddp":  # the gradients become views of the buckets
        gradients = 0.0
    moments = {
        "teacher": {"gradients": before, "teacher's activations": _running(teacher, setup)},
        "loss": {"gradients": before, **_at_loss(student, setup, kept)},
        "update": {"gradients": gradients, **_at_update(student, setup, kept)},
    }
    largest = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: size for name, size in {**state, **moments[largest]}.items() if size}
    return TrainingMemory(parts, largest, host)


def adapter_parameters(student: ModelSize, rank: int) -> int:
    """Parameters of adapters on all linear layers: rank · (rows + columns) of each of them."""
    family, found = student.family, 0
    for name, shape in family.expected(student.config).items():
        if len(shape) == 2 and ".layers." in name and "experts" not in name:
            found += rank * sum(shape)
    return found


def _trained(student: ModelSize, setup: TrainingSetup) -> float:
    """Number of trained parameters."""
    if setup.adapter_rank:
        share = 1 - setup.frozen_layers / student.sizes["layers"]
        return adapter_parameters(student, setup.adapter_rank) * share
    frozen = setup.frozen_layers * student.layer_parameters
    return student.parameters - (frozen + student.table if setup.frozen_layers else 0)


def _state(student: ModelSize, setup: TrainingSetup) -> tuple[dict[str, float], float]:
    """Bytes that stay during the whole step on the device, and in the host's memory."""
    trained = _trained(student, setup)
    if setup.adapter_rank:
        weights = setup.frozen_bytes * student.parameters + 4 * trained
    else:
        weights = setup.master_bytes * student.parameters
    state = {"weights": weights, "optimizer": setup.moment_bytes * trained}
    state = {name: size / setup.shards for name, size in state.items()}
    if setup.sharding == "ddp":
        state["gradient buckets"] = setup.master_bytes * trained
    if not setup.cpu_offload:
        return state, 0.0
    return {}, sum(state.values()) + setup.master_bytes * trained / setup.shards


def _teacher_bytes(teacher: ModelSize, setup: TrainingSetup) -> float:
    """Bytes of the teacher's weights on one device."""
    number = setup.compute_bytes
    tables = number * teacher.table * (1 if teacher.tied else 2)
    layers = number * teacher.parameters - tables
    layer = layers / teacher.sizes["layers"]
    return {
        "whole": tables + layers,
        "int8": tables + layers / number,
        "shares": tables + layers / setup.devices + layer,
        "node_shares": tables + layers / min(setup.node, setup.devices) + layer,
        "disk": tables + layer * (2 if setup.device == "cuda" else 1),  # the next one is copied
        "cache": number * teacher.table,
    }[setup.teacher]


def _running(teacher: ModelSize | None, setup: TrainingSetup) -> float:
    """Bytes while one layer of the teacher runs: its stream and the widest tensors of the layer."""
    if teacher is None or setup.teacher == "cache":
        return 0.0
    full = teacher.sizes
    wide = full.get("mlp", 0)
    if "experts" in full:
        wide = max(
            wide,
            full["expert_mlp"] * teacher.family.value(teacher.config, "num_experts_per_tok"),
        )
    heads = full["heads"] * full["head_dim"]
    numbers = setup.tokens * (4 * full["hidden"] + max(3 * wide, 5 * heads))
    return float(setup.compute_bytes * numbers)


def _at_loss(student: ModelSize, setup: TrainingSetup, kept: Activations) -> dict[str, float]:
    """Bytes when the forward pass and the loss end, and the backward pass of a layer begins."""
    layers = student.sizes["layers"] - setup.frozen_layers
    stream = 4 * setup.tokens * student.sizes["hidden"]
    in_layers, copies = layers * kept.layer, (layers + setup.frozen_layers) * kept.copies
    if setup.checkpointing:  # autocast keeps its copies until the forward pass ends
        in_layers = layers * stream
    parts = {"activations": float(kept.base + in_layers + stream)}
    sharded = setup.shards > 1
    parts["half-precision weights"] = float(GATHERED * kept.copies if sharded else copies)
    trains_head = not (setup.adapter_rank or (setup.frozen_layers and student.tied))
    parts["loss"] = 4.0 * student.table * trains_head + stream
    if sharded:
        parts["half-precision weights"] += 2 * student.table * (1 if student.tied else 2)
    backward = _backward(student, setup, kept) + (kept.layer if setup.checkpointing else 0)
    parts["work"] = max(_head_work(student, setup), backward)
    return parts


def _head_work(student: ModelSize, setup: TrainingSetup) -> float:
    """Temporary bytes of head and loss: the head in half precision, and chunks of logits."""
    vocabulary = student.sizes["vocab"]
    chunks = head_chunk(setup.device, vocabulary).bytes(setup.tokens, vocabulary)
    return float(chunks + (2 * student.table if setup.copies else 0))


def _backward(student: ModelSize, setup: TrainingSetup, kept: Activations) -> float:
    """Temporary bytes in the backward pass of one layer.

    The gradients of its widest tensors and of its stream, and the gradient of its largest matrix in
    half precision and in float32; in a shard the gradients of two whole layers in float32.
    """
    full = student.sizes
    wide = max(full.get("mlp", 0), full.get("expert_mlp", 0))
    tensors = setup.tokens * (6 * wide + 8 * full["hidden"])
    if setup.shards > 1:
        return float(tensors + 4 * GATHERED * student.layer_parameters)
    matrix = wide * full["hidden"] * (4 + 2 * setup.copies)
    return float(tensors + (0 if setup.adapter_rank else matrix))


def _at_update(student: ModelSize, setup: TrainingSetup, kept: Activations) -> dict[str, float]:
    """Bytes when the backward pass ends: the embedding's gradient comes last."""
    if setup.adapter_rank or setup.frozen_layers:
        return {"work": _backward(student, setup, kept)}
    extra = 4.0 * student.table if student.tied or setup.accumulation > 1 else 0.0
    whole = 4.0 * student.table if setup.shards > 1 else 0.0
    return {"work": extra + whole + 4 * setup.tokens * student.sizes["hidden"]}
