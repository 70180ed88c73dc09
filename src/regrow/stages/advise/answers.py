"""One way to a smaller model: what it becomes, what it loses and costs, and what it misses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from regrow.cost import jobs
from regrow.cost.devices import Device, find
from regrow.cost.model import ModelSize
from regrow.cost.units import size_text
from regrow.pruning.config import bytes_of
from regrow.stages.advise.config import AdviseConfig
from regrow.stages.advise.tables import Points

BITS = {"bf16": 16, "fp8": 8, "int4": 4, "Q8_0": 8, "Q4_K_M": 4}


@dataclass(frozen=True)
class Answer:
    """One way, from the mildest to the deepest."""

    name: str
    """Short name, also of its recipe: int4, prune-80-int4, …"""
    kind: str
    """stored, smaller, taught, pruned or tiny."""
    title: str
    reason: str
    source: str
    size: ModelSize
    """The model that comes out."""
    format: str
    loss: Points | None
    """Expected loss in points of a benchmark of 100; None if nobody has measured it."""
    tokens: float = 0.0
    """Tokens of distillation; 0 without training."""
    cost: jobs.Cost | None = None
    """Cost of the training; None without training."""
    recipe: dict[str, Any] | None = None
    misses: list[str] = field(default_factory=list)
    """Targets, budget and tolerated loss that it does not keep."""

    @property
    def bytes(self) -> int:
        """Bytes of the result's tensors."""
        return self.size.bytes(self.format)

    def ratio(self, before: ModelSize) -> float:
        """How many times fewer bytes than the model in bf16."""
        return before.bytes("bf16") / self.bytes

    @property
    def middle(self) -> float:
        """The middle of the expected loss; infinite if it is not known."""
        return float("inf") if self.loss is None else sum(self.loss) / 2


@dataclass(frozen=True)
class Limits:
    """The targets of a request, in bytes and milliseconds."""

    bytes: float
    ram: float
    decode_ms: float | None
    prefill_ms: float | None
    device: Device

    @classmethod
    def of(cls, model: ModelSize, config: AdviseConfig) -> Limits:
        """The limits that a request means for a model."""
        device = find(config.device)
        sizes = [float("inf")]
        if config.smaller is not None:
            sizes.append(model.bytes("bf16") / config.smaller)
        if config.max_bytes is not None:
            sizes.append(bytes_of(config.max_bytes))
        ram = device.bytes
        if config.max_ram is not None:
            ram = min(ram, bytes_of(config.max_ram))
        return cls(min(sizes), ram, config.max_decode_ms, config.max_prefill_ms, device)

    def missed(self, size: ModelSize, format: str, config: AdviseConfig) -> list[str]:
        """A few words for each limit that a model in a format does not keep."""
        found = []
        if size.bytes(format) > 1.02 * self.bytes:
            found.append(f"{size_text(size.bytes(format))}, target {size_text(self.bytes)}")
        ram = size.ram(format, config.context_length)
        if ram > self.ram:
            found.append(f"needs {size_text(ram)} of RAM, there are {size_text(self.ram)}")
        decode = 1000 * decode_seconds(size, self.device, format, config.context_length)
        if self.decode_ms is not None and decode > self.decode_ms:
            found.append(f"{decode:.1f} ms a token, target {self.decode_ms:g}")
        prefill = jobs.prefill_seconds(size, self.device, config.prompt_tokens)
        if self.prefill_ms is not None and prefill is None:
            found.append(f"time of a prompt unknown: {self.device.title} has no known rate")
        elif self.prefill_ms is not None and prefill is not None:
            own = 1000 * prefill * (1 - config.shared_prefix)
            if own > self.prefill_ms:
                found.append(f"{own:.0f} ms for a prompt, target {self.prefill_ms:g}")
        return found


def decode_seconds(size: ModelSize, device: Device, format: str, context: int) -> float:
    """Seconds of a decoding step in the middle of a context."""
    return jobs.decode_seconds(size, device, format, context // 2)


def over_budget(cost: jobs.Cost | None, config: AdviseConfig) -> list[str]:
    """A few words for each part of the budget that a cost passes."""
    if cost is None:
        return []
    found = []
    if config.gpu_hours is not None and cost.device_hours > config.gpu_hours:
        found.append(f"{cost.device_hours:,.1f} GPU hours, budget {config.gpu_hours:,g}")
    if config.money is not None and cost.money is None:
        found.append("its price is unknown")
    elif config.money is not None and cost.money is not None and cost.money[1] > config.money:
        found.append(f"${cost.money[1]:,.0f}, budget ${config.money:,.0f}")
    return found
