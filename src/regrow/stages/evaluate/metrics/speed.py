"""Speed: reading prompts and generating with the KV cache, all models in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy
import psutil
import torch

from regrow.runtime.progress import progress
from regrow.stage_dir import Figure
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.eval_model import EvalModel, MetricResult

SHARE = 0.5
"""Of the free memory that models may take which are timed in turn."""


@dataclass(frozen=True)
class Setting:
    """How many prompts of how many tokens at once, and how many tokens after them."""

    batch: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.prompt}"


@dataclass(frozen=True)
class Run:
    """Seconds to the first token, and for each further one."""

    first: float
    others: list[float]

    @property
    def per_token(self) -> float:
        """Mean seconds of the further ones."""
        return sum(self.others) / len(self.others)


def measure_all(
    subjects: dict[str, EvalModel], config: EvaluateConfig, teacher: str | None
) -> dict[str, MetricResult]:
    """Rates, time to the first token and per further one, at every batch size and length.

    Models stay loaded and take turns, so that a busy machine slows all alike; where they do not fit
    in memory together, one is timed after the other. Speed-ups are to the teacher or the first
    model, of those that the same program runs.
    """
    settings = [
        Setting(batch, prompt, config.decode_tokens)
        for batch in config.batch_sizes
        for prompt in config.prefill_tokens
    ]
    in_turn = len(subjects) > 1 and _fit(list(subjects.values()))
    runs: dict[str, dict[Setting, list[Run]]] = {
        label: {setting: [] for setting in settings} for label in subjects
    }
    turns = [(n, label) for n in range(config.repeats + 1) for label in subjects]
    if not in_turn:
        turns.sort(key=lambda turn: list(subjects).index(turn[1]))
    with progress("evaluate: speed", len(turns) * len(settings), "runs") as counter:
        for number, label in turns:
            for setting in settings:
                runs[label][setting].append(_run(subjects[label], setting))
                counter.advance(1)
            if not in_turn and number == config.repeats:
                subjects[label].unload()
    how = "models in turn" if in_turn else "one model after the other"
    found = {
        label: MetricResult(
            _figures(subjects[label], runs[label], how if len(subjects) > 1 else "")
        )
        for label in subjects
    }
    for label in subjects:
        base = _base(subjects, label, teacher)
        if label != base:
            found[label].figures.extend(
                _speed_ups(subjects[label], subjects[base], runs[label], runs[base])
            )
    return found


def _base(subjects: dict[str, EvalModel], label: str, teacher: str | None) -> str:
    """The model that another's speed is compared with: the first run by the same program."""
    order = subjects if teacher is None else [teacher, *subjects]
    return next(other for other in order if subjects[other].engine == subjects[label].engine)


def _fit(subjects: list[EvalModel]) -> bool:
    """Whether all models are expected to fit in the memory of their device together."""
    device = subjects[0].device
    wanted = sum(subject.bytes_to_load for subject in subjects)
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    return bool(wanted < SHARE * free)


def _run(subject: EvalModel, setting: Setting) -> Run:
    """One timed run."""
    seconds = subject.times(setting.batch, setting.prompt, setting.new)
    return Run(seconds[0], seconds[1:])


def _figures(subject: EvalModel, runs: dict[Setting, list[Run]], how: str) -> list[Figure]:
    figures = []
    for number, (setting, every) in enumerate(runs.items()):
        timed = every[1:]
        tail = "" if number == 0 else f"/{setting}"
        turns = f"{len(timed)} runs after a warm-up" + (f", {how}" if how else "")
        prompt = f"a prompt of {setting.prompt} random tokens, batch {setting.batch}"
        after = f"{setting.new} {subject.next_tokens} tokens after {prompt}, with KV cache"
        first = [1000 * run.first for run in timed]
        others = [1000 * seconds for run in timed for seconds in run.others]
        read = [setting.batch * setting.prompt / run.first for run in timed]
        generated = [setting.batch / run.per_token for run in timed]
        for name, values, unit, what, choose in (
            ("prefill", read, "tokens/s", prompt, median),
            ("decode", generated, "tokens/s", after, median),
            ("ttft", first, "ms", f"time to the first token of {prompt}", median),
            ("ttft_p95", first, "ms", f"time to the first token of {prompt}", _p95),
            ("time_per_output_token", others, "ms", f"each of {after}", median),
            ("time_per_output_token_p95", others, "ms", f"each of {after}", _p95),
        ):
            statistic = "median" if choose is median else "95th percentile"
            spread = f"runs from {min(values):,.1f} to {max(values):,.1f}"
            convention = f"{what}, {subject.where}, {statistic} of {turns}; {spread}"
            figures.append(_figure(name + tail, values, choose, unit, convention))
    return figures


def _figure(
    name: str,
    values: list[float],
    choose: Callable[[list[float]], float],
    unit: str,
    convention: str,
) -> Figure:
    return Figure(name=name, value=choose(values), unit=unit, n=len(values), convention=convention)


def _p95(values: list[float]) -> float:
    return float(numpy.percentile(values, 95))


def _speed_ups(
    mine: EvalModel,
    base: EvalModel,
    runs: dict[Setting, list[Run]],
    theirs: dict[Setting, list[Run]],
) -> list[Figure]:
    """Speed ÷ the base's, medians of the turns, and that as a share of the ratio of operations."""
    found = []
    for number, setting in enumerate(runs):
        tail = "" if number == 0 else f"/{setting}"
        pairs = list(zip(runs[setting], theirs[setting], strict=True))[1:]
        ratios = {
            "prefill": [b.first / a.first for a, b in pairs],
            "decode": [b.per_token / a.per_token for a, b in pairs],
        }
        operations = _flop_ratios(mine, base, setting)
        for kind, values in ratios.items():
            ratio = median(values)
            spread = f"turns from {min(values):.3f} to {max(values):.3f}"
            how = f"speed of {kind} ÷ that of {base.label}, median of {len(values)} turns"
            where = f"batch {setting.batch}, {setting.prompt} tokens, {mine.where}"
            found.append(
                _figure(f"{kind}_speedup{tail}", values, median, "", f"{how}, {where}; {spread}")
            )
            if operations is not None:
                share = (
                    f"speed-up of {kind} ÷ ratio of operations (projections, attention, head) of "
                    f"{base.label} to this one's, {where}; {ratio:.3f} ÷ {operations[kind]:.3f}"
                )
                found.append(
                    Figure(
                        name=f"{kind}_of_flops{tail}",
                        value=ratio / operations[kind],
                        n=len(values),
                        convention=share,
                    )
                )
    return found


def _flop_ratios(mine: EvalModel, base: EvalModel, setting: Setting) -> dict[str, float] | None:
    """Operations of the base ÷ this model's; None where a family is not known."""
    counts = []
    for subject in (base, mine):
        read = subject.flops(setting.prompt)
        written = subject.flops(1, past=setting.prompt + setting.new // 2)
        if read is None or written is None:
            return None
        counts.append((read, written))
    return {
        "prefill": counts[0][0] / counts[1][0],
        "decode": counts[0][1] / counts[1][1],
    }
