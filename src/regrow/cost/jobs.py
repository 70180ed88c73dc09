"""Hours and money of jobs on named devices: reading, training, generating, preference pairs.

The efficiency of a job is the share of the device's rate of dense bf16 products that it reaches.
`EFFICIENCY` is fitted on one published run, and checked against another one in
`benchmarks/published_runs.py`. Over several devices, a step takes the longer of its computing and
its communication, which are assumed to overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from regrow.cost.devices import Device
from regrow.cost.memory import NODE, Sharding
from regrow.cost.model import ModelSize
from regrow.cost.operations import BACKWARD, FORWARD
from regrow.errors import UserError

EFFICIENCY = 0.212
"""Share of the bf16 rate: Qwen3-8B, 36 to 24 layers, 90·10⁹ tokens in sequences of 4,096 took about
6,000 H100 hours (NVIDIA Model-Optimizer, examples/nemo_run/prune_distill, read 2026-11-29)."""
BANDWIDTH_SHARE = 0.6
"""Share of a device's memory bandwidth that decoding reaches: 0.5 to 0.7 by
https://www.canirunthis.ai/blog/bandwidth-not-flops, read 2026-11-29; not measured by us."""
BATCH = 128
"""Sequences that are generated together, unless the KV cache leaves room for fewer."""


class Cost(NamedTuple):
    """Cost of a job, independent of the number of devices that share it."""

    name: str
    operations: float
    device_hours: float
    money: tuple[float, float] | None
    """Lowest and highest price in US dollars; None if the device has no known price."""


def _cost(name: str, operations: float, seconds: float, device: Device) -> Cost:
    hours = seconds / 3600
    return Cost(name, operations, hours, device.money(hours))


def total(name: str, costs: list[Cost]) -> Cost:
    """The sum of several jobs."""
    money = [each.money for each in costs]
    known = [each for each in money if each is not None]
    spent = (sum(low for low, _ in known), sum(high for _, high in known))
    return Cost(
        name,
        sum(each.operations for each in costs),
        sum(each.device_hours for each in costs),
        spent if len(known) == len(money) else None,
    )


def rate(device: Device, efficiency: float = EFFICIENCY) -> float:
    """Operations per second of a job; raises UserError for a device without a known rate."""
    if device.bf16_tflops is None:
        raise UserError(f"{device.title} has no bf16_tflops in the table of devices: add it")
    return device.bf16_tflops * 1e12 * efficiency


def distillation_operations(
    student: ModelSize,
    teacher: ModelSize | None,
    length: int,
    adapter: str = "none",
    checkpointing: bool = False,
) -> float:
    """Operations per token: 2 for each parameter of the teacher, 6 for each of the student.

    With adapters 4 for each of the student; 2 more when activations are recomputed. Attention is
    counted in the same proportion. A cached teacher is None.
    """
    passes = (FORWARD * (2 if checkpointing else 1) + BACKWARD[adapter]) / FORWARD
    read = 0.0 if teacher is None else teacher.forward(length)
    return read + passes * student.forward(length)


def distil(
    student: ModelSize,
    teacher: ModelSize | None,
    tokens: float,
    device: Device,
    length: int = 4096,
    adapter: str = "none",
    checkpointing: bool = False,
) -> Cost:
    """Training a student on `tokens` tokens; without a teacher: next-token training, or a cache."""
    each = distillation_operations(student, teacher, length, adapter, checkpointing)
    return _cost("distil", tokens * each, tokens * each / rate(device), device)


def read(model: ModelSize, tokens: float, device: Device, length: int = 4096) -> Cost:
    """Forward passes over `tokens` tokens: profile, evaluation, or filling a cache."""
    operations = tokens * model.forward(length)
    return _cost("read", operations, operations / rate(device), device)


def decode_seconds(
    model: ModelSize, device: Device, format: str = "bf16", past: int = 512, batch: int = 1
) -> float:
    """Seconds of one decoding step: the longer of moving its bytes and of computing.

    Bytes: all weights once (of a mixture of experts: the chosen ones) and the KV cache of each
    sequence. A device without a known rate is limited by its bandwidth alone.
    """
    weights = model.bytes(format) * model.active / model.parameters
    moved = weights + batch * past * model.cache_per_token
    seconds = moved / (device.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE)
    if device.bf16_tflops is not None:
        seconds = max(seconds, batch * FORWARD * model.multiplied / rate(device))
    return seconds


def prefill_seconds(model: ModelSize, device: Device, prompt: int) -> float | None:
    """Seconds to process a prompt; None for a device whose rate is not known."""
    if device.bf16_tflops is None:
        return None
    return prompt * model.forward(prompt) / rate(device)


def devices_for(model: ModelSize, device: Device, format: str = "bf16") -> int:
    """Devices over which a model's weights must be divided, with a fifth more for the rest."""
    needed = ceil(1.2 * model.bytes(format) / device.bytes)
    return 1 << (needed - 1).bit_length()


def generate(
    model: ModelSize,
    examples: float,
    prompt: int,
    answer: int,
    device: Device,
    format: str = "bf16",
) -> Cost:
    """Answering `examples` prompts, in batches as large as the KV cache allows."""
    group, length = devices_for(model, device, format), prompt + answer
    free = group * device.bytes - 1.1 * model.bytes(format)
    batch = max(1, min(BATCH, int(free // (length * model.cache_per_token))))
    step = decode_seconds(model, device, format, prompt + answer // 2, batch)
    read_seconds = examples * prompt * model.forward(prompt) / rate(device)
    seconds = read_seconds + examples / batch * answer * step
    return _cost("generate", examples * length * model.forward(length), seconds, device)


def prefer(student: ModelSize, pairs: float, prompt: int, answer: int, device: Device) -> Cost:
    """Preference training (DPO) on pairs of answers: a reference reads what the student learns.

    Both answers of a pair, with their prompts: 6 operations for each parameter of the student and 2
    for each of the reference, which is the student before.
    """
    length = prompt + answer
    each = distillation_operations(student, student, length)
    operations = 2 * pairs * length * each
    return _cost("preference pairs", operations, operations / rate(device), device)


@dataclass(frozen=True)
class Cluster:
    """Several devices that share a distillation."""

    device: Device
    count: int
    batch_tokens: int = 1 << 20
    """Tokens of an optimizer step, over all devices."""
    micro_tokens: int = 8192
    """Tokens of a micro-batch on one device."""
    sharding: Sharding = "fsdp"

    def efficiency(self, student: ModelSize, teacher: ModelSize | None, length: int) -> float:
        """Share of the time of a step that is computing: 1 where communication is hidden."""
        share = self.batch_tokens / self.count
        computing = share * distillation_operations(student, teacher, length) / rate(self.device)
        return computing / max(computing, self.communication(student, teacher))

    def communication(self, student: ModelSize, teacher: ModelSize | None) -> float:
        """Seconds of a step's communication (ring algorithms; docs/clusters.md).

        DDP: 8 bytes for each parameter of the student. FSDP: 8 for each of the student and 2 for
        each of the teacher, for each micro-batch. HSDP: as FSDP inside a node, and each device's
        share of the gradients between nodes.
        """
        if self.count == 1:
            return 0.0
        micro = max(1, ceil(self.batch_tokens / self.count / self.micro_tokens))
        read_bytes = 0 if teacher is None else 2 * teacher.parameters
        gathered = micro * (8 * student.parameters + read_bytes)
        reduced = 8 * student.parameters
        within, between = self.device.link_gb_s, self.device.network_gb_s
        if within is None or (between is None and self.count > NODE):
            raise UserError(f"{self.device.title} has no link_gb_s or network_gb_s: add them")
        slow = between if between is not None and self.count > NODE else within
        if self.sharding == "hsdp" and self.count > NODE:
            return gathered / (within * 1e9) + reduced / NODE / (slow * 1e9)
        moved = gathered if self.sharding in ("fsdp", "hsdp") else reduced
        return moved / (slow * 1e9)

    def hours(
        self, work: Cost, student: ModelSize, teacher: ModelSize | None, length: int
    ) -> float:
        """Hours on the clock of a distillation that takes `work.device_hours` on one device."""
        return work.device_hours / self.count / self.efficiency(student, teacher, length)
