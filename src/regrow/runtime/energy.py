"""Energy of a stage, from hardware counters: RAPL for CPUs, NVML for GPUs.

Nothing is measured if no counter is readable. On most systems, only root can read RAPL.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
EVERY = 60.0
"""Seconds between two readings; at full power, a counter overflows after some minutes."""


@dataclass(frozen=True)
class Counter:
    """An energy counter in joules; it overflows at `size` joules, or never if `size` is 0."""

    name: str
    read: Callable[[], float]
    size: float = 0.0


class Meter:
    """Joules of all counters since `start`, including other work on the same machine."""

    def __init__(self) -> None:
        self.counters: list[Counter] = []
        self.last: list[float] = []
        self.joules = 0.0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        """Find the counters and, if there are any, start the thread that reads them."""
        self.counters = [*_rapl(), *_nvml()]
        self.last = [counter.read() for counter in self.counters]
        if self.counters:
            self.thread.start()

    def stop(self) -> dict[str, Any]:
        """Return `{"energy": {joules, meters}}` for a manifest, or an empty dict if unmeasured."""
        self.stopped.set()
        if not self.counters:
            return {}
        self.thread.join()
        self.update()
        meters = [counter.name for counter in self.counters]
        return {"energy": {"joules": round(self.joules, 1), "meters": meters}}

    def update(self) -> None:
        """Add the joules since the last reading."""
        for number, counter in enumerate(self.counters):
            now = counter.read()
            joules = now - self.last[number]
            self.joules += joules + counter.size if joules < 0 else joules
            self.last[number] = now

    def _look(self) -> None:
        while not self.stopped.wait(EVERY):
            self.update()


def _rapl() -> list[Counter]:
    """Counters of packages and memory; other zones are parts of a package or contain them all."""
    counters = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            size = float((zone / "max_energy_range_uj").read_text()) / 1e6
            counter = Counter(f"RAPL {name}", _reader(zone / "energy_uj"), size)
            counter.read()
        except (OSError, ValueError):
            continue
        if name.startswith(("package", "dram")):
            counters.append(counter)
    return counters


def _reader(path: Path) -> Callable[[], float]:
    return lambda: float(path.read_text()) / 1e6


def _nvml() -> list[Counter]:
    """One counter for each GPU that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return []
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    counters = []
    for number in range(count.value):
        handle = ctypes.c_void_p()
        if visible is not None and str(number) not in visible.split(","):
            continue
        if nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle)):
            continue
        millijoules = ctypes.c_ulonglong()
        if not nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            counters.append(Counter(f"NVML GPU {number}", _gpu_reader(nvml, handle)))
    return counters


def _gpu_reader(nvml: Any, handle: ctypes.c_void_p) -> Callable[[], float]:
    def read() -> float:
        millijoules = ctypes.c_ulonglong()
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return millijoules.value / 1000

    return read
