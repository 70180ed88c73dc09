"""Runs a process or a function and measures its time and its peak memory."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def watch(command: list[str], **options: Any) -> tuple[int, float, int]:
    """Exit code, seconds, and peak anonymous memory in bytes, sampled every 5 ms.

    `options` are those of Popen.
    """
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, **options)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.005)
    return process.wait(), time.perf_counter() - start, peak


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


def _status(name: str) -> int:
    """A field of /proc/self/status in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise KeyError(name)
