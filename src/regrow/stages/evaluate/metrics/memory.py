"""Load time, and the peak of memory while loading, reading a prompt and generating."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from regrow.stage_dir import Figure
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult, now

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
NEW = 4
"""Tokens generated after the prompt."""


def measure(model: EvalModel, context: Context) -> MetricResult:
    """Seconds to load, and bytes at the peak of loading, reading a prompt and generating.

    On a CPU it is the largest resident set minus that before loading (on Linux only), on a GPU the
    most that torch allocated.
    """
    model.unload()
    batch, prompt = max(context.config.batch_sizes), max(context.config.prefill_tokens)
    before = _begin(model.device)
    start = now(model.device)
    model.load()
    seconds = now(model.device) - start
    model.times(batch, prompt, NEW - 1)
    figures = [
        Figure(
            name="load_time",
            value=seconds,
            unit="s",
            n=1,
            convention=f"{model.engine}, files as warm in the cache as they were, {model.where}",
        )
    ]
    if before is not None:
        kind = "allocated by torch" if model.device.type == "cuda" else "resident in memory"
        figures.append(
            Figure(
                name="peak_memory",
                value=_peak(model.device) - before,
                unit="bytes",
                n=1,
                convention=f"most bytes {kind} above those before loading, while loading, reading "
                f"{batch} x {prompt} tokens and generating {NEW}; {model.where}",
            )
        )
    return MetricResult(figures)


def _begin(device: torch.device) -> int | None:
    """Reset the peak; bytes in use now, or None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    gc.collect()
    try:
        # Freed memory that the allocator keeps would hide a part of the model's.
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")  # VmHWM becomes VmRSS
        return _status("VmRSS")
    except (OSError, AttributeError):  # another system, or C library
        return None


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")
