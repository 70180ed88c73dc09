"""Jobs of several processes, as torchrun or accelerate start them."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LONGEST_WAIT = timedelta(days=7)
"""How long a process waits for work that another one does alone."""
GRACE = 5.0
"""Seconds that a process leaves to process 0, which prints the error, before it ends too."""


def world_size() -> int:
    """The number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def join(cpu: bool) -> None:
    """Start the process group when there are several processes (gloo on the CPU, NCCL on GPUs)."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu)


def wait() -> None:
    """Wait until every process has come to this call; a job of one process goes on at once."""
    if world_size() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier(group=_patient_group())


@functools.cache
def _patient_group() -> Any:
    """A process group that waits for a long stage; NCCL and gloo give up after minutes."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


@contextmanager
def alone() -> Iterator[None]:
    """Let process 0 work as if it were the only process of the job."""
    kept = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    _forget_processes()
    try:
        yield
    finally:
        os.environ.update(kept)
        _forget_processes()


def _forget_processes() -> None:
    """Let accelerate read the environment anew: it remembers how many processes there are."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def on_main(work: Callable[[], T], cpu: bool) -> T:
    """What `work()` returns in process 0, in every process; the others wait for it.

    An error in process 0 ends all of them, and process 0 alone prints it.
    """
    if world_size() == 1:
        return work()
    import torch.distributed as dist

    join(cpu)
    outcome: list[tuple[bool, Any]] = [(False, None)]
    group = _patient_group()
    try:
        if is_main():
            with alone():
                outcome = [(True, work())]
    finally:
        dist.broadcast_object_list(outcome, src=0, group=group)
        join(cpu)
    done, result = outcome[0]
    if not done:
        time.sleep(GRACE)
        raise SystemExit(2)
    returned: T = result
    return returned


def lost_peer(error: RuntimeError) -> bool:
    """Whether an error means that another process of the job has ended."""
    import torch.distributed as dist

    text = str(error)
    messages = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(message in text for message in messages)
