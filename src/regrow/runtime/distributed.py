"""Jobs of several processes (ranks), started by torchrun, accelerate or srun.

A stage says in its entry how it works in such a job (`Stage.ranks`). This module does the rest: it
joins the processes, lets process 0 work alone while the others wait, divides work, brings results
together, and ends all processes when one of them fails.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from regrow.errors import UserError

T = TypeVar("T")
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TIMEOUT = "REGROW_TIMEOUT"
"""Environment variable: minutes after which a transfer between processes counts as failed."""
MINUTES = 120.0
LONGEST_WAIT = timedelta(days=30)
"""Timeout for processes that wait while another one works alone."""
GRACE = 5.0
"""Seconds that other processes wait before they exit, so that one process can print the error."""
VISIBLE = 60.0
"""Seconds after which every node sees a new file in a shared folder."""
FAILED = "regrow/failed/{attempt}"
"""Key in the job's store: the rank and the exit code of the first process that failed."""


def world_size() -> int:
    """The number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """The number of processes of the job on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def rank() -> int:
    """The index of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


def leave_error_to_main() -> None:
    """Before an error is printed: let process 0 print it, unless it is known to be only here."""
    if not is_main() and not _Watch.failed_first:
        time.sleep(GRACE)


def timeout() -> timedelta:
    """The time after which a transfer counts as failed; raises UserError if it is no number."""
    given = os.environ.get(TIMEOUT) or MINUTES
    with suppress(ValueError, OverflowError):
        if float(given) > 0:
            return timedelta(minutes=float(given))
    raise UserError(f"{TIMEOUT}={given}: give the minutes as a number above 0")


def join() -> None:
    """Start the process group when there are several processes: gloo, and NCCL on GPUs.

    Raises UserError if a node has more processes than GPUs.
    """
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    limit, backend = timeout(), "gloo"
    if torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"process {rank()} has no GPU of its own: this node has {count}; start that many "
                "processes per node"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=limit)


def leave() -> None:
    """Wait for all processes and end the process group, if there is one."""
    if world_size() == 1 or "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        wait()
        _patient_group.cache_clear()
        dist.destroy_process_group()


def wait() -> None:
    """Wait until every process has reached this call; does nothing in a job of one process."""
    if world_size() > 1:
        import torch.distributed as dist

        join()
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
        with hidden_group():
            yield
    finally:
        os.environ.update(kept)
        _forget_processes()


@contextmanager
def hidden_group() -> Iterator[None]:
    """Hide the process group from libraries that use it as soon as there is one.

    compressed-tensors, for example, lets all processes take part when one loads a model.
    """
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    group = None if c10d is None else c10d.GroupMember.WORLD
    if c10d is None or group is None:
        yield
        return
    c10d._update_default_pg(None)
    try:
        yield
    finally:
        c10d._update_default_pg(group)


def _forget_processes() -> None:
    """Make accelerate read the environment again, because it caches the number of processes."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def on_first(work: Callable[[], T]) -> T:
    """Run `work()` in process 0 and return its result in every process; the others wait.

    Process 0 works as if it were alone. An error in it ends all processes; the others exit
    silently.
    """
    if world_size() == 1:
        return work()
    import torch.distributed as dist

    join()
    outcome: list[tuple[bool, Any]] = [(False, None)]
    group = _patient_group()
    try:
        if is_main():
            with alone():
                outcome = [(True, work())]
    finally:
        dist.broadcast_object_list(outcome, src=0, group=group)
    done, result = outcome[0]
    if not done:
        time.sleep(GRACE / 2)  # process 0 may still have to say with which code it ends
        code = 2 if _Watch.running is None else _Watch.running.code()
        time.sleep(GRACE / 2)
        raise SystemExit(code)
    returned: T = result
    return returned


def from_first(work: Callable[[], T]) -> T:
    """Run `work()` in process 0 and return its result in every process.

    Unlike `on_first`, for a part of a split stage: process 0 still counts as one of many.
    """
    if world_size() == 1:
        return work()
    import torch.distributed as dist

    join()
    group = _patient_group()
    result: list[Any] = [work() if is_main() else None]
    dist.broadcast_object_list(result, src=0, group=group)
    returned: T = result[0]
    return returned


def share(items: Sequence[T]) -> list[T]:
    """The items that this process works on: every `world_size`-th one."""
    return list(items[rank() :: world_size()])


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    join()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_patient_group())
    return values


def merged(parts: Mapping[Any, T]) -> dict[Any, T]:
    """One dict of the entries of all processes, whose keys differ."""
    return {key: value for part in gathered(dict(parts)) for key, value in part.items()}


def sum_over_ranks(sums: dict[str, Any]) -> dict[str, Any]:
    """Tensors by name, each the sum of those of that name in all processes; changed in place.

    A process may lack a name; its device is then that of its other tensors.
    """
    if world_size() == 1:
        return sums
    import torch
    import torch.distributed as dist

    device = next((tensor.device for tensor in sums.values()), torch.device("cpu"))
    known = merged({name: (tensor.shape, tensor.dtype) for name, tensor in sums.items()})
    for name, (shape, dtype) in sorted(known.items()):
        if name not in sums:
            sums[name] = torch.zeros(shape, dtype=dtype, device=device)
        on_gpu = device.type == "cuda" and dist.is_nccl_available()
        part = sums[name].contiguous() if on_gpu else sums[name].cpu().contiguous()
        dist.all_reduce(part, group=None if on_gpu else _patient_group())
        sums[name] = part.to(device)
    return sums


def agree(what: str, value: Any) -> None:
    """Raise UserError, in every process, unless `value` is the same in all of them."""
    if world_size() == 1:
        return
    seen = gathered((value, socket.gethostname()))
    for number, (other, host) in enumerate(seen):
        if other != seen[0][0]:
            raise UserError(
                f"{what}: process {number} on {host} differs from process 0 on {seen[0][1]}; give "
                "all nodes the same files, for instance in a shared folder"
            )


def require_shared(path: Path) -> None:
    """Raise UserError, in every process, if one of them does not see a file that process 0 wrote.

    Network file systems may show a new file after a while.
    """
    if world_size() == 1:
        return
    end = time.monotonic() + VISIBLE
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)
    blind = [host for there, host in gathered((path.exists(), socket.gethostname())) if not there]
    if blind:
        raise UserError(
            f"{blind[0]} does not see {path.parent}, in which process 0 writes: give --out a "
            "folder that all nodes share"
        )


@contextmanager
def together() -> Iterator[None]:
    """Let all processes work in this block: an error in one of them ends all of them.

    The error is raised in the process that fails first. The others exit silently, with the same
    exit code.
    """
    if world_size() == 1 or _Watch.running is not None:
        yield
        return
    join()
    watch = _Watch.running = _Watch()
    watch.start()
    try:
        yield
    except SystemExit:  # of a process that has waited for one that failed
        raise
    except BaseException as error:
        if watch.claim(error):
            raise
        code = watch.code()
        time.sleep(GRACE)
        raise SystemExit(code) from None
    finally:
        _Watch.running = None
        watch.stopped.set()


class _Watch(threading.Thread):
    """Ends this process if another one has failed and this one does not notice.

    A process that waits for a transfer with a failed one can wait until the timeout.
    """

    running: _Watch | None = None
    failed_first = False
    """Whether this process has failed before all others."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        from torch.distributed import TCPStore

        self.stopped = threading.Event()
        self.key = FAILED.format(attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        stores = (TCPStore(address, port, is_master=False, timeout=timeout()) for _ in range(2))
        self.store, self.of_thread = stores

    def run(self) -> None:
        """Look for a failure every second; give the process time to end by itself."""
        while not self.stopped.wait(1.0):
            try:
                failed = self.of_thread.check([self.key])
            except RuntimeError:  # the store is gone, and with it process 0 or its node
                failed = True
            if failed:
                break
        if not self.stopped.wait(2 * GRACE):
            os._exit(self.code())

    def claim(self, error: BaseException) -> bool:
        """Whether this process is the first that failed; it then prints the error."""
        code = 2 if isinstance(error, UserError | OSError | MemoryError) else 1
        code = 130 if isinstance(error, KeyboardInterrupt) else code
        own = f"{rank()} {code}"
        try:
            _Watch.failed_first = self.store.compare_set(self.key, "", own).decode() == own
        except RuntimeError:
            _Watch.failed_first = is_main()
        return _Watch.failed_first

    def code(self) -> int:
        """The exit code of the process that failed."""
        with suppress(RuntimeError):
            if self.store.check([self.key]):
                return int(self.store.get(self.key).decode().split()[1])
        return 1


def lost_peer(error: BaseException) -> bool:
    """Whether an error means that another process of the job has ended."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    text = str(error)
    messages = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(message in text for message in messages)
