"""How a job runs: what never changes its result, kept out of configs, manifests and hashes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from regrow.config import Config
from regrow.errors import UserError

if TYPE_CHECKING:
    import torch


class Options(Config):
    """Where and in what portions to compute."""

    device: str = "auto"
    """Device to compute on: auto (a GPU when there is one), cpu, cuda, cuda:1, mps."""
    batch_size: int = 4
    """Blocks computed at once on a device; lower it when memory runs out."""

    order: Literal["auto", "resident", "layer"] = "auto"
    """How a profile runs: the whole model resident, layer by layer with hidden states on disk (for
    models larger than the device), or whichever fits."""

    sharding: Literal["none", "fsdp"] = "none"
    """What each GPU of a distillation holds: all (none), or its share of student, optimizer and
    teacher (fsdp: FSDP2), for models larger than a GPU."""
    deepspeed: str | None = None
    """A DeepSpeed config (JSON, ZeRO stage 0 to 2) to distil under."""
    offload_teacher: bool = False
    """Read each block of a distillation's teacher from its file when it runs, and hold one at a
    time: less memory, more time; for teachers larger than a device."""
    torch_compile: bool = False
    """Compile the blocks of a distillation's models: quicker steps in less memory, after a minute
    or two of compiling."""
    gradient_checkpointing: bool = False
    """Compute a distillation's activations again in the backward pass: less memory, more time."""

    def torch_device(self) -> torch.device:
        """The device to use; raises UserError for one this machine lacks."""
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


def cache_folder() -> Path:
    """Where fetched and converted inputs are kept: $REGROW_CACHE or ~/.cache/regrow."""
    return Path(os.environ.get("REGROW_CACHE") or "~/.cache/regrow").expanduser()
