"""Runs a process or a function and measures its time and its peak memory."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def watch(command: list[str], **options: Any) -> tuple[int, float, int]:
    """Exit code, seconds, and peak anonymous memory in bytes, sampled every 5 ms.

    The memory is that of the process and of all that it has started. `options` are those of Popen.
    """
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, **options)
    while process.poll() is None:
        peak = max(peak, sum(map(anonymous, _with_children(str(process.pid)))))
        time.sleep(0.005)
    return process.wait(), time.perf_counter() - start, peak


def _with_children(process: str) -> Iterator[str]:
    """The process and those that it and its children have started."""
    yield process
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # the process or its thread has ended
            continue
        for child in children:
            yield from _with_children(child)


def anonymous(process: str) -> int:
    """Anonymous memory of a process in bytes; 0 if it has ended."""
    try:
        return 1024 * _status("RssAnon", process)
    except (OSError, KeyError):
        return 0


def peak_above(run: Callable[[], Any]) -> int:
    """Bytes by which memory rises at most, above what it is before, while `run` is called.

    What is free but kept by the allocator would hide a part of it, and is given back first.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    run()
    return 1024 * (_status("VmHWM") - before)


def _status(name: str, process: str = "self") -> int:
    """A field of /proc/PROCESS/status in kB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise KeyError(name)
