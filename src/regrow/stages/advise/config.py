"""A request for advice: target, tolerated loss, budget, task, hardware and use."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regrow.config import Config
from regrow.pruning.config import Size

Use = Literal["open", "internal", "commercial", "competing"]


class AdviseConfig(Config):
    """What the smaller model must keep to, and what it may cost. Several targets must all be met;
    without any, the model must fit the memory of `device`."""

    smaller: float | None = Field(default=None, gt=1)
    """How many times fewer bytes than the model in bf16."""
    max_bytes: Size | None = None
    """Upper limit on the bytes of the tensors, such as 4GB."""
    max_ram: Size | None = None
    """Upper limit on the bytes of weights, KV cache and activations at `context_length` tokens."""
    max_decode_ms: float | None = Field(default=None, gt=0)
    """Upper limit on the milliseconds for each generated token, on `device`, for one user."""
    max_prefill_ms: float | None = Field(default=None, gt=0)
    """Upper limit on the milliseconds to process `prompt_tokens`, on `device`."""
    context_length: int = Field(default=4096, ge=1)
    """Tokens in the KV cache."""
    prompt_tokens: int = Field(default=512, ge=1)
    """Tokens of a prompt."""
    shared_prefix: float = Field(default=0.0, ge=0, lt=1)
    """Share of a prompt that is the same in all requests, such as a long instruction."""
    plain: bool = False
    """Keep 16-bit weights, for programs that have no kernels for fewer bits."""
    tolerated_loss: float = Field(default=3.0, ge=0)
    """Points of a benchmark of 100 that may be lost."""
    gpu_hours: float | None = Field(default=None, ge=0)
    """Hours of one `train_on` device that may be spent; 0: no training at all."""
    money: float | None = Field(default=None, ge=0)
    """US dollars that may be spent."""
    device: str = "h100"
    """Device that the smaller model runs on: a name in cost/devices.yaml, such as laptop."""
    train_on: str = "h100"
    """Device that trains."""
    gpus: int = Field(default=1, ge=1)
    """Number of training devices."""
    task: Literal["general", "narrow"] = "general"
    """Whether the model must keep all of its abilities, or one narrow task."""
    use: Use = "internal"
    """Intended use of the student, for the licence: open (its weights are published), internal,
    commercial, or competing with the maker of the model."""
    data: tuple[str, ...] = ()
    """Sources of text for the recipe: of the task, for a narrow one."""
