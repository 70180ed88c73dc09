"""Memory of a device: how much there is, and errors that say that there was too little."""

from __future__ import annotations

import torch

FULL = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_cpu")
"""Parts of the messages of torch and of the system, in lower case."""


def device_bytes(device: torch.device) -> int:
    """Bytes of a GPU's memory, or the bytes that this machine can still give to a process."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or a driver means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in message for words in FULL)
