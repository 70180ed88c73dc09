"""The base class of all configs, and the options that never change a result.

A config is frozen and strict, and the docstrings of its fields are their help texts. `Options` set
the device, the batch size and the use of memory; they are not part of configs, manifests or hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from regrow.errors import UserError, nearest

if TYPE_CHECKING:
    import torch


class Config(BaseModel):
    """A frozen set of fields. An unknown key is an error, and so is a number that is not finite.

    A field's docstring is its help text.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Put each field's docstring on one line: `--help` wraps it to the terminal's width."""
        for field in cls.model_fields.values():
            field.description = " ".join(field.description.split()) if field.description else None

    def digest(self) -> str:
        """SHA-256 of the fields' canonical JSON, as hex."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


ConfigT = TypeVar("ConfigT", bound=Config)


def parse(kind: type[ConfigT], fields: Any, where: str) -> ConfigT:
    """Validate `fields` as a `kind`; raises UserError with its location and a remedy."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
        if first["type"] == "extra_forbidden":
            allowed = _fields_at(kind, first["loc"][:-1])
            name = str(first["loc"][-1])
            hint = nearest(name, allowed) or f"; allowed: {', '.join(sorted(allowed))}"
            raise UserError(f"{path}: unknown key{hint}") from None
        raise UserError(f"{path}: {reason(first)}") from None


def reason(error: ErrorDetails) -> str:
    """The message of a validation error and the rejected value, unless that is a whole config."""
    message = error["msg"].removeprefix("Value error, ")
    of_all = error["type"] == "value_error" and isinstance(error["input"], dict)
    if error["type"] == "missing" or of_all:
        return message
    return f"{message} (given: {_short(error['input'])})"


def check_pattern(pattern: str) -> None:
    """Raise ValueError for a text that is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def _short(value: Any) -> str:
    """`value` as Python writes it, cut to 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


def _fields_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the config at `path`, which may lead through lists and unions."""
    for part in path:
        if isinstance(part, str) and part in kind.model_fields:
            inner = _config_inside(kind.model_fields[part].annotation)
            if inner is not None:
                kind = inner
    return list(kind.model_fields)


def _config_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        config = _config_inside(argument)
        if config is not None:
            return config
    return None


class Machine(Config):
    """Device and batch size, which change a result by rounding at most."""

    device: str = "auto"
    """Device to compute on: auto (a GPU when there is one), cpu, cuda, cuda:1, mps."""
    batch_size: int = Field(default=4, ge=1)
    """Sequences per batch on a device; lower it when memory runs out."""

    def options(self) -> Options:
        """The same settings as `Options`."""
        return Options(**self.model_dump())

    def torch_device(self) -> torch.device:
        """The device to use; raises UserError when this machine has no such device."""
        import torch

        if self.device == "auto":
            if torch.cuda.is_available():
                return torch.device("cuda")
            return torch.device("cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"device {self.device!r} cannot be used here: {reason}") from None
        return device


class ProfileMachine(Machine):
    """Device, batch size and order of a profile, which change a result by rounding at most."""

    order: Literal["auto", "resident", "layer"] = "auto"
    """Execution order of a profile: the whole model in memory (resident), one layer at a time with
    hidden states on disk (layer: for models larger than the device), or whichever fits (auto)."""


class ReconstructMachine(Machine):
    """Device, batch size and compilation, which change a result by rounding at most."""

    torch_compile: bool = False
    """Compile the layers of a distillation's models, and those that a reconstruction trains: faster
    steps with less memory, after a minute or two of compilation."""


class Options(ReconstructMachine, ProfileMachine):
    """Device, batch size and use of memory, which change a result by rounding at most."""

    sharding: Literal["none", "fsdp", "fsdp_offload", "hsdp"] = "none"
    """Use of several GPUs in a distillation: each GPU has a full copy of student, optimizer and
    teacher (none), or a shard of them (fsdp: FSDP2, for models larger than a GPU). fsdp_offload
    also keeps the student's shards, gradients and optimizer in the host's memory, and is slower.
    hsdp shards inside each node and has copies on all nodes, which moves less between them."""
    deepspeed: str | None = None
    """Distill under DeepSpeed with this config file (JSON, ZeRO stage 0 to 2)."""
    offload_teacher: bool = False
    """Distill with one layer of the teacher in memory at a time, loaded from its file when it runs.
    This needs less memory and more time, and is for teachers larger than a device."""
    attention: Literal["sdpa", "flex_attention"] = "sdpa"
    """Kernel of attention in a distillation. sdpa reads a mask of tokens × tokens where documents
    are packed; flex_attention, on a GPU, skips the blocks between two documents and is for long
    sequences."""
    gradient_checkpointing: bool = False
    """Distill with activations recomputed in the backward pass: less memory, more time."""
    save_minutes: float = Field(default=30.0, gt=0)
    """Minutes without a checkpoint after which a distillation writes one, also between two
    measurements; a stopped run loses at most that time."""


def cache_folder() -> Path:
    """The folder for downloads, converted models and file hashes: $REGROW_CACHE or
    ~/.cache/regrow.
    """
    return Path(os.environ.get("REGROW_CACHE") or "~/.cache/regrow").expanduser()
