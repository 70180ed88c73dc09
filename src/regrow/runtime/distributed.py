"""Several processes of one job, as torchrun or accelerate start them."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes share the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes and talks."""
    return os.environ.get("RANK", "0") == "0"


def join(cpu: bool) -> None:
    """Start the process group when there are several processes (gloo on the CPU, NCCL on GPUs)."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu)


def wait() -> None:
    """Wait until every process is here; nothing to wait for in a job of one."""
    if world_size() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()


def lost_peer(error: RuntimeError) -> bool:
    """Whether an error says that another process of the job is gone."""
    import torch.distributed as dist

    text = str(error)
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(words in text for words in gone)
