"""Speed of prefill and of decoding with the KV cache; the models take turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy

from regrow.runtime.progress import progress
from regrow.stage_dir import Figure
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.eval_model import EvalModel, MetricResult, fit_together


@dataclass(frozen=True)
class Setting:
    """A batch size, a prompt length in tokens, and the number of new tokens after each prompt."""

    batch: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.prompt}"


@dataclass(frozen=True)
class Run:
    """Seconds to the first token, and seconds of each further token."""

    first: float
    others: list[float]

    @property
    def per_token(self) -> float:
        """Mean seconds of the further tokens."""
        return sum(self.others) / len(self.others)


def measure_all(
    models: dict[str, EvalModel], config: EvaluateConfig, teacher: str | None
) -> dict[str, MetricResult]:
    """Measure tokens/s, time to first token and time per output token in every setting.

    A setting is a batch size with a prompt length. Models stay loaded and take turns, so that other
    load on the machine slows all of them equally. If they do not fit in memory together, they are
    timed one after the other. Speed-ups are relative to the teacher, or to the first model, among
    the models that the same program runs.
    """
    settings = [
        Setting(batch, prompt, config.decode_tokens)
        for batch in config.batch_sizes
        for prompt in config.prefill_tokens
    ]
    in_turn = len(models) > 1 and fit_together(list(models.values()))
    runs: dict[str, dict[Setting, list[Run]]] = {
        label: {setting: [] for setting in settings} for label in models
    }
    turns = [(n, label) for n in range(config.repeats + 1) for label in models]
    if not in_turn:
        turns.sort(key=lambda turn: list(models).index(turn[1]))
    with progress("evaluate: speed", len(turns) * len(settings), "runs") as counter:
        for number, label in turns:
            for setting in settings:
                runs[label][setting].append(_run(models[label], setting))
                counter.advance(1)
            if not in_turn and number == config.repeats:
                models[label].unload()
    order = "models in turn" if in_turn else "one model after the other"
    results = {
        label: MetricResult(_figures(model, runs[label], order if len(models) > 1 else ""))
        for label, model in models.items()
    }
    for label in models:
        base = _base(models, label, teacher)
        if label != base:
            results[label].figures.extend(
                _speed_ups(models[label], models[base], runs[label], runs[base])
            )
    return results


def _base(models: dict[str, EvalModel], label: str, teacher: str | None) -> str:
    """The baseline of a model's speed-up: the first model that the same program runs."""
    order = models if teacher is None else [teacher, *models]
    return next(other for other in order if models[other].engine == models[label].engine)


def _run(model: EvalModel, setting: Setting) -> Run:
    """One timed run."""
    seconds = model.times(setting.batch, setting.prompt, setting.new)
    return Run(seconds[0], seconds[1:])


def _figures(model: EvalModel, runs: dict[Setting, list[Run]], order: str) -> list[Figure]:
    figures = []
    for number, (setting, all_runs) in enumerate(runs.items()):
        timed = all_runs[1:]
        tail = "" if number == 0 else f"/{setting}"
        turns = f"{len(timed)} runs after a warm-up" + (f", {order}" if order else "")
        prompt = f"a prompt of {setting.prompt} random tokens, batch {setting.batch}"
        after = f"{setting.new} {model.next_tokens} tokens after {prompt}, with KV cache"
        first = [1000 * run.first for run in timed]
        others = [1000 * seconds for run in timed for seconds in run.others]
        read = [setting.batch * setting.prompt / run.first for run in timed]
        generated = [setting.batch / run.per_token for run in timed]
        for name, values, unit, definition, choose in (
            ("prefill", read, "tokens/s", prompt, median),
            ("decode", generated, "tokens/s", after, median),
            ("ttft", first, "ms", f"time to the first token of {prompt}", median),
            ("ttft_p95", first, "ms", f"time to the first token of {prompt}", _p95),
            ("time_per_output_token", others, "ms", f"each of {after}", median),
            ("time_per_output_token_p95", others, "ms", f"each of {after}", _p95),
        ):
            statistic = "median" if choose is median else "95th percentile"
            spread = f"runs from {min(values):,.1f} to {max(values):,.1f}"
            convention = f"{definition}, {model.hardware}, {statistic} of {turns}; {spread}"
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
    model: EvalModel,
    base: EvalModel,
    runs: dict[Setting, list[Run]],
    base_runs: dict[Setting, list[Run]],
) -> list[Figure]:
    """Speed ÷ the speed of `base`, as the median over turns; also divided by the FLOP ratio."""
    figures = []
    for number, setting in enumerate(runs):
        tail = "" if number == 0 else f"/{setting}"
        pairs = list(zip(runs[setting], base_runs[setting], strict=True))[1:]
        ratios = {
            "prefill": [b.first / a.first for a, b in pairs],
            "decode": [b.per_token / a.per_token for a, b in pairs],
        }
        operations = _flop_ratios(model, base, setting)
        for kind, values in ratios.items():
            ratio = median(values)
            spread = f"turns from {min(values):.3f} to {max(values):.3f}"
            definition = f"speed of {kind} ÷ that of {base.label}, median of {len(values)} turns"
            setting_text = f"batch {setting.batch}, {setting.prompt} tokens, {model.hardware}"
            figures.append(
                _figure(
                    f"{kind}_speedup{tail}",
                    values,
                    median,
                    "",
                    f"{definition}, {setting_text}; {spread}",
                )
            )
            if operations is not None:
                share = (
                    f"speed-up of {kind} ÷ ratio of operations (projections, attention, head) of "
                    f"{base.label} to this one's, {setting_text}; "
                    f"{ratio:.3f} ÷ {operations[kind]:.3f}"
                )
                figures.append(
                    Figure(
                        name=f"{kind}_of_flops{tail}",
                        value=ratio / operations[kind],
                        n=len(values),
                        convention=share,
                    )
                )
    return figures


def _flop_ratios(model: EvalModel, base: EvalModel, setting: Setting) -> dict[str, float] | None:
    """FLOPs of `base` ÷ FLOPs of the model; None if a family is unknown."""
    counts = []
    for counted in (base, model):
        prefill_flops = counted.flops(setting.prompt)
        decode_flops = counted.flops(1, past=setting.prompt + setting.new // 2)
        if prefill_flops is None or decode_flops is None:
            return None
        counts.append((prefill_flops, decode_flops))
    return {
        "prefill": counts[0][0] / counts[1][0],
        "decode": counts[0][1] / counts[1][1],
    }
