"""Jobs of several processes, started by torchrun or accelerate."""

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
"""Timeout for processes that wait while another one works alone."""
GRACE = 5.0
"""Seconds that other processes wait before they exit, so that process 0 can print the error."""


def world_size() -> int:
    """The number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The index of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


def join(cpu: bool) -> None:
    """Start the process group when there are several processes (gloo on the CPU, NCCL on GPUs)."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu)


def wait() -> None:
    """Wait until every process has reached this call; does nothing in a job of one process."""
    if world_size() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier(group=_patient_group())


@functools.cache
def _patient_group() -> Any:
    """A process group with a long timeout, because NCCL and gloo time out after minutes."""
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
    """Make accelerate read the environment again, because it caches the number of processes."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def on_main(work: Callable[[], T], cpu: bool) -> T:
    """Run `work()` in process 0 and return its result in every process; the others wait.

    An error in process 0 ends all processes; only process 0 prints it.
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
