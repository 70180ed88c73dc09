"""Load time, and the peak of memory from before loading to the end of one long answer."""

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


def measure(subject: EvalModel, context: Context) -> MetricResult:
    """Seconds to load, and bytes at the peak of loading, reading a prompt and a few tokens more.

    On a CPU the high water of the resident set above what the process held before, where the
    system tells it (Linux); on a GPU what torch allocated there at most.
    """
    subject.unload()
    batch, prompt = max(context.config.batch_sizes), max(context.config.prefill_tokens)
    before = _begin(subject.device)
    start = now(subject.device)
    subject.load()
    seconds = now(subject.device) - start
    subject.times(batch, prompt, NEW - 1)
    figures = [
        Figure(
            name="load_time",
            value=seconds,
            unit="s",
            n=1,
            convention=f"{subject.engine}, files as warm as they are, {subject.where}",
        )
    ]
    if before is not None:
        how = "allocated by torch" if subject.device.type == "cuda" else "resident in memory"
        figures.append(
            Figure(
                name="peak_memory",
                value=_peak(subject.device) - before,
                unit="bytes",
                n=1,
                convention=f"most bytes {how} above what was there before, while loading, reading "
                f"{batch} x {prompt} tokens and generating {NEW}; {subject.where}",
            )
        )
    return MetricResult(figures)


def _begin(device: torch.device) -> int | None:
    """Start a new high-water mark; bytes in use now, or None where that cannot be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    gc.collect()
    try:
        # What was freed but kept for later would hide part of what the model takes.
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
