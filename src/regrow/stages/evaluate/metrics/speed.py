"""Speed at batch size 1: reading a prompt, and generating with the KV cache."""

from __future__ import annotations

import time
from itertools import islice
from statistics import median

import torch

from regrow.manifest import Figure
from regrow.progress import say
from regrow.stages.evaluate.greedy import decode, prefill
from regrow.stages.evaluate.subject import Context, Measured, Subject


def measure(subject: Subject, context: Context) -> Measured:
    """Median tokens/s of prefill and decode over the runs after a warm-up; spread is min to max."""
    config = context.config
    say(f"evaluate {subject.label}: speed, {config.repeats} runs after a warm-up")
    generator = torch.Generator().manual_seed(0)
    vocabulary = subject.model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, config.prefill_tokens), generator=generator)
    runs = [
        _run(subject, ids.to(subject.device), config.decode_tokens)
        for _ in range(config.repeats + 1)
    ][1:]
    lengths = (config.prefill_tokens, config.decode_tokens)
    what = (
        f"a prompt of {lengths[0]} random tokens",
        f"{lengths[1]} greedy tokens after a prompt of {lengths[0]}, with KV cache",
    )
    return Measured(
        [
            _figure(name, [length / seconds for seconds in times], f"{how}, {_where(subject)}")
            for name, length, how, times in zip(
                ("prefill", "decode"), lengths, what, zip(*runs, strict=True), strict=True
            )
        ]
    )


def _run(subject: Subject, ids_1T: torch.Tensor, decode_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of the decoding."""
    times = [_now(subject.device)]
    token, cache = prefill(subject.model, ids_1T)
    times.append(_now(subject.device))
    for _ in islice(decode(subject.model, token, cache), decode_tokens):
        pass
    times.append(_now(subject.device))
    return times[1] - times[0], times[2] - times[1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _figure(name: str, rates: list[float], how: str) -> Figure:
    spread = f"runs from {min(rates):,.1f} to {max(rates):,.1f}"
    convention = f"{how}, batch 1, median of {len(rates)} runs after a warm-up; {spread}"
    return Figure(
        name=name, value=median(rates), unit="tokens/s", n=len(rates), convention=convention
    )


def _where(subject: Subject) -> str:
    dtype = str(subject.dtype).removeprefix("torch.")
    if subject.device.type == "cuda":
        return f"{dtype} on {torch.cuda.get_device_name(subject.device)}"
    return f"{dtype} on {subject.device.type} with {torch.get_num_threads()} threads"
