"""Section on distillation: training and held-out losses over tokens, and each loss by name.

The curves of several runs are in the same plots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from regrow.stages.report import charts
from regrow.stages.report.numbers import duration
from regrow.stages.report.page import Block, Chart, Section
from regrow.stages.report.run_folder import Run

POINTS = 800
SMOOTHING = 0.1
"""Weight of a new value in the running mean."""
WIDE = 20
"""An axis is logarithmic if its largest value is more than this many times its smallest."""
SMALL = 0.01
"""Below this value, plotly would use SI prefixes, such as 200μ."""
LEGEND = 16
"""Pixels per legend line; on a phone, each curve has its own line."""
NO_LOSS = ("stage", "step", "tokens", "seconds", "epoch", "loss", "learning_rate", "grad_norm")
HELDOUT = "heldout_"
KL = "heldout_kl"
PACE = (("grad_norm", "gradient norm"), ("learning_rate", "learning rate"))
NOTE = "In nats per scored token, held-out text at temperature 1. Lower is better."

Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """One distillation: its name, and its rows of metrics.jsonl."""

    name: str
    rows: list[dict[str, Any]]

    def pairs(self, name: str) -> Pairs:
        """Return (tokens, value) of the rows with this value, except values that are not finite."""
        rows = [row for row in self.rows if name in row and "tokens" in row]
        values = [(row["tokens"], float(row[name])) for row in rows]
        return [(tokens, float(f"{v:.5g}")) for tokens, v in values if math.isfinite(v)]

    @property
    def parts(self) -> list[str]:
        """Names of the losses and feature losses that are logged next to the total loss."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        parts = [n for n in names if n not in NO_LOSS and not n.startswith(HELDOUT)]
        return parts if len(parts) > 1 or self.pairs("loss") != self.pairs("".join(parts)) else []

    @property
    def heldout_parts(self) -> list[str]:
        """Names of the held-out measurements other than the KL."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name.startswith(HELDOUT) and name != KL]


def section(runs: list[Run]) -> Section | None:
    """Loss and held-out KL; single losses and feature losses; gradient norm and learning rate."""
    curves = [curve for run in runs for curve in _curves(run)]
    groups = [[curve] for curve in curves]
    if len({id(run) for run in runs if run.metrics}) > 1:
        groups = [curves]  # several runs are compared in one plot
    blocks = [chart for group in groups for chart in _charts(group) if chart is not None]
    return Section("training", "Distillation", NOTE, blocks) if blocks else None


def _curves(run: Run) -> list[Curves]:
    stages = list(dict.fromkeys(str(row["stage"]) for row in run.metrics if "stage" in row))
    alone = run.name if len(stages) == 1 else ""
    return [
        Curves(alone or run.at(stage), [row for row in run.metrics if row.get("stage") == stage])
        for stage in stages
    ]


def _charts(group: list[Curves]) -> list[Block | None]:
    pace = [_pace(group, *of) for of in PACE]
    return [_main(group), _parts(group), _heldout(group), *pace]


def _main(group: list[Curves]) -> Chart | None:
    """The loss in a faint colour, its running mean, and the held-out KL."""
    traces: list[charts.Trace] = []
    for number, curve in enumerate(group):
        shade = 2 * number if len(group) > 1 else 0
        prefix = f"{curve.name}: " if len(group) > 1 else ""
        steps, heldout = curve.pairs("loss"), curve.pairs(KL)
        if steps:
            faint = charts.line(f"{prefix}loss", *_columns(_thin(steps)), shade + 1)
            if not prefix:
                traces.append({**faint, "mode": "lines", "opacity": 0.35})
            mean = charts.line(f"{prefix}loss, running mean", *_mean(steps), shade + 1)
            traces.append({**mean, "mode": "lines"})
        if heldout:
            traces.append(charts.line(f"{prefix}held-out KL", *_columns(heldout), shade))
    caption = "; ".join(f"{curve.name}: {_summary(curve)}" for curve in group)
    return _chart(traces, "nats per token", caption)


def _summary(curve: Curves) -> str:
    tokens = max(float(row.get("tokens", 0)) for row in curve.rows)
    return f"{tokens:,.0f} tokens in {duration(seconds_of(curve.rows))}"


def seconds_of(rows: list[dict[str, Any]]) -> float:
    """Training seconds over all processes that took part; each process counts from 0."""
    total = last = 0.0
    for row in rows:
        now = float(row.get("seconds", 0.0))
        if now < last:  # another process continued the training
            total += last
        last = now
    return total + last


def _parts(group: list[Curves]) -> Chart | None:
    traces = _lines(group, [curve.parts for curve in group], smooth=True)
    caption = f"Losses and feature losses by name, running means, {_names(group)}"
    return _chart(traces, "value per token", caption, half=len(group) == 1)


def _heldout(group: list[Curves]) -> Chart | None:
    traces = _lines(group, [curve.heldout_parts for curve in group], smooth=False)
    caption = f"Held-out text: losses and feature losses by name, {_names(group)}"
    return _chart(traces, "value per token", caption, half=len(group) == 1)


def _lines(group: list[Curves], names: list[list[str]], smooth: bool) -> list[charts.Trace]:
    traces: list[charts.Trace] = []
    for curve, loss_names in zip(group, names, strict=True):
        for name in loss_names:
            pairs = curve.pairs(name)
            if not pairs:
                continue
            prefix = f"{curve.name}: " if len(group) > 1 else ""
            x, y = _mean(pairs) if smooth else _columns(pairs)
            shown = name.removeprefix(HELDOUT)
            trace = charts.line(f"{prefix}{shown}", x, y, len(traces))
            traces.append({**trace, "mode": "lines"} if smooth else trace)
    return traces


def _pace(group: list[Curves], name: str, title: str) -> Chart | None:
    """Gradient norm or learning rate."""
    traces = []
    for number, curve in enumerate(group):
        if pairs := curve.pairs(name):
            columns = _mean(pairs) if name == "grad_norm" else _columns(_thin(pairs))
            traces.append({**charts.line(curve.name, *columns, number), "mode": "lines"})
    mean = " (running mean)" if name == "grad_norm" else ""
    caption = f"{title[0].upper()}{title[1:]}{mean}, {_names(group)}"
    return _chart(traces, title, caption, half=True)


def _names(group: list[Curves]) -> str:
    return ", ".join(curve.name for curve in group)


def _chart(
    traces: list[charts.Trace], title: str, caption: str, half: bool = False
) -> Chart | None:
    if not traces:
        return None
    values = [value for trace in traces for value in trace["y"]]
    wide = min(values) > 0 and max(values) > WIDE * min(values)
    scale = {"type": "log", "dtick": "D2"} if wide else {"rangemode": "tozero"}
    if max(values) < SMALL:
        scale["exponentformat"] = "power"
    y = charts.axis(title + (" (log scale)" if wide else ""), **scale)
    x = charts.axis("tokens", rangemode="tozero")
    figure = charts.figure(traces, x, y)
    legend = LEGEND * max(0, len(traces) - 3)
    return Chart(figure, caption, (300 if half else 340) + legend, half=half)


def _mean(pairs: Pairs) -> tuple[list[float], list[float]]:
    """Exponential moving average from the first value, thinned to about POINTS points."""
    means = []
    mean = pairs[0][1]
    for tokens, value in pairs:
        mean += SMOOTHING * (value - mean)
        means.append((tokens, float(f"{mean:.5g}")))
    return _columns(_thin(means))


def _thin(pairs: Pairs) -> Pairs:
    return pairs[:: max(1, len(pairs) // POINTS)]


def _columns(pairs: Pairs) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]
