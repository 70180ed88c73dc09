"""Load time, and peak memory of loading, prefill and decoding."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from regrow.stage_dir import Figure
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult, now

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
NEW = 4
"""Number of tokens to generate after the prompt."""


def measure(model: EvalModel, context: Context) -> MetricResult:
    """Measure the load time in seconds, and the peak memory of loading, prefill and decoding.

    On a CPU, the peak is the largest resident set minus the resident set before loading (on Linux
    only). On a GPU, it is the largest amount that torch allocated, minus that before loading.
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
            convention=f"{model.engine}, files as warm in the cache as they were, {model.hardware}",
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
                f"{batch} x {prompt} tokens and generating {NEW}; {model.hardware}",
            )
        )
    return MetricResult(figures)


def _begin(device: torch.device) -> int | None:
    """Reset the peak and return the bytes in use; None if the system cannot report them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    gc.collect()
    try:
        # The allocator keeps freed memory; reusing it would hide a part of the model's memory.
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")  # resets VmHWM to VmRSS
        return _status("VmRSS")
    except (OSError, AttributeError):  # another operating system or C library
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
