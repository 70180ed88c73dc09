"""Sections on quality against size and speed, and on quality step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from regrow.stages.report import charts
from regrow.stages.report.charts import front, places
from regrow.stages.report.evaluated import Evaluated, of
from regrow.stages.report.numbers import title
from regrow.stages.report.page import Block, Chart, Section
from regrow.stages.report.run_folder import Run
from regrow.stages.report.sections.tasks import mean_scores, scored

NOTE = (
    "Each point is a model; the dotted line joins the models that no other model beats in both "
    "values. Figures of separate evaluations compare only if they were measured in the same way."
)
COSTS = {"bytes": 1e6, "prefill": 1.0, "decode": 1.0}
"""Figures on the cost axis, and the divisor of each."""
AXES = {
    "bytes": "size of the weights, MB",
    "prefill": "reading prompts, tokens/s",
    "decode": "generating, tokens/s",
}
MARGIN = 0.14
WIDE = 8
"""An axis is logarithmic if its largest value is more than this many times its smallest."""
LABELLED = 12


@dataclass(frozen=True)
class Axis:
    """Values of one quantity to compare, for all models that have it."""

    title: str
    values: dict[str, float]
    more_is_better: bool = False

    @property
    def log(self) -> bool:
        """Whether the axis is logarithmic."""
        values = list(self.values.values())
        return min(values) > 0 and max(values) > WIDE * min(values)

    def position(self, label: str) -> float:
        """Position of a model in plotly's axis units: log10 on a logarithmic axis."""
        value = self.values[label]
        return math.log10(value) if self.log else value

    def range(self) -> tuple[float, float]:
        """Limits of the axis."""
        positions = [self.position(label) for label in self.values]
        room = MARGIN * ((max(positions) - min(positions)) or abs(max(positions)) or 1.0)
        return min(positions) - room, max(positions) + room


def section(runs: list[Run]) -> Section | None:
    """For each quality (perplexity, tasks), a plot against size and against each speed."""
    evaluated = of(runs)
    if evaluated is None:
        return None
    blocks: list[Block] = []
    for quality in _qualities(evaluated):
        for name, unit in COSTS.items():
            values = _values(evaluated, name)
            cost = Axis(AXES[name], {k: v / unit for k, v in values.items()}, name != "bytes")
            measured = [
                label for label in evaluated.labels if label in values and label in quality.values
            ]
            if len(measured) > 1:
                blocks.append(_chart(evaluated, measured, cost, quality))
    return Section("tradeoff", "Quality against size and speed", NOTE, blocks) if blocks else None


def _values(evaluated: Evaluated, name: str) -> dict[str, float]:
    values = {label: evaluated.value(label, name) for label in evaluated.labels}
    return {label: value for label, value in values.items() if value is not None}


def _qualities(evaluated: Evaluated) -> list[Axis]:
    """Perplexity or, if the tokenizers differ, bits per byte; exact answers, and the mean score
    of the tasks.

    Of several texts, the first is used, and each further text that adds models.
    """
    axes: list[Axis] = []
    drawn: set[str] = set()
    names = [*evaluated.texts("perplexity"), *evaluated.texts("bits_per_byte")]
    for name in sorted(names, key=lambda name: bool(evaluated.unlike(name))):
        values = _values(evaluated, name)
        if len(values) > 1 and set(values) - drawn:
            difference = evaluated.unlike(name)
            axes.append(
                Axis(
                    title(name) + (f" (different {difference} by run)" if difference else ""),
                    values,
                )
            )
            drawn |= set(values)
    for name in evaluated.texts("exact_answers"):
        if len(values := _values(evaluated, name)) > 1:
            axes.append(Axis(title(name), values, more_is_better=True))
    tasks = scored(evaluated)
    if tasks and len(means := mean_scores(evaluated, tasks)) > 1:
        axes.append(Axis(f"mean score of {len(tasks)} tasks", means, more_is_better=True))
    return axes


def _chart(evaluated: Evaluated, labels: list[str], cost: Axis, quality: Axis) -> Chart:
    cost = Axis(cost.title, {k: cost.values[k] for k in labels}, cost.more_is_better)
    quality = Axis(quality.title, {k: quality.values[k] for k in labels}, quality.more_is_better)
    (x0, x1), (y0, y1) = cost.range(), quality.range()
    points = merged(evaluated, labels, cost, quality)
    shares = [
        ((cost.position(label) - x0) / (x1 - x0), (quality.position(label) - y0) / (y1 - y0))
        for label in points
    ]
    names = [charts.clip(name) for name in points.values()]
    positions = places(shares, names)
    groups: dict[str, list[int]] = {}
    for number, label in enumerate(points):
        groups.setdefault(evaluated.runs[label].name, []).append(number)
    traces = [_front(cost, quality)]
    run_names = list(dict.fromkeys(evaluated.runs[label].name for label in evaluated.labels))
    for run, numbers in groups.items():
        members, shade = [list(points)[n] for n in numbers], run_names.index(run)
        trace = _points(
            evaluated, members, cost, quality, charts.SHADES[shade % len(charts.SHADES)]
        )
        if len(points) <= LABELLED:
            shown = [charts.label(names[n]) for n in numbers]
            trace |= {"text": shown, "textposition": [positions[n] for n in numbers]}
            trace["mode"] = "markers+text"
        traces.append({**trace, "name": charts.label(run or "this run")})
    layout = {"showlegend": len(groups) > 1}
    x = charts.axis(cost.title, range=[x0, x1], **_scale(cost))
    y = charts.axis(quality.title, range=[y0, y1], **_scale(quality))
    better = "upper" if quality.more_is_better else "lower"
    side = "right" if cost.more_is_better else "left"
    caption = f"{quality.title} over {cost.title}; best is {better} {side}"
    caption = caption[0].upper() + caption[1:]
    return Chart(charts.figure(traces, x, y, **layout), caption, 330, half=True)


def merged(evaluated: Evaluated, labels: list[str], cost: Axis, quality: Axis) -> dict[str, str]:
    """Return the names to plot by model label; models at the same point share one entry.

    The run's name is left out, because the colour shows the run.
    """
    points: dict[tuple[float, float], list[str]] = {}
    for label in labels:
        points.setdefault((cost.values[label], quality.values[label]), []).append(label)
    return {
        same[0]: ", ".join(dict.fromkeys(evaluated.short(label) for label in same))
        for same in points.values()
    }


def _scale(axis: Axis) -> dict[str, str]:
    return {"type": "log", "dtick": "D2"} if axis.log else {}


def _points(
    evaluated: Evaluated, labels: list[str], cost: Axis, quality: Axis, colour: str
) -> charts.Trace:
    final, first = set(evaluated.results), {evaluated.references[label] for label in labels}
    symbols = [
        "square" if label in first else "diamond" if label in final else "circle"
        for label in labels
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [cost.values[label] for label in labels],
        "y": [quality.values[label] for label in labels],
        "marker": {"size": 12, "color": colour, "symbol": symbols},
        "cliponaxis": False,
        "customdata": [[charts.label(label)] for label in labels],
        "hovertemplate": "%{customdata[0]}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    }


def _front(cost: Axis, quality: Axis) -> charts.Trace:
    """A step line of the Pareto front: the best quality within a limit on the cost."""
    x_sign, y_sign = -1 if cost.more_is_better else 1, -1 if quality.more_is_better else 1
    points = [(x_sign * cost.values[k], y_sign * quality.values[k]) for k in cost.values]
    best = front(points)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [x_sign * x for x, _ in best],
        "y": [y_sign * y for _, y in best],
        "line": {"color": charts.FAINT, "width": 1.5, "shape": "hv", "dash": "dot"},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def step_by_step(runs: list[Run]) -> Section | None:
    """Perplexity and KL over the models of the first run, with a line per text."""
    evaluated = of(runs[:1])
    if evaluated is None or len(evaluated.labels) < 2:
        return None
    blocks = [
        chart
        for kind, title in (
            ("perplexity", "perplexity"),
            ("kl", "KL to the teacher, nats per token"),
        )
        if (chart := _lines(evaluated, kind, title)) is not None
    ]
    if not blocks:
        return None
    return Section("quality", "Quality, step by step", "Lower is better.", blocks)


def _lines(evaluated: Evaluated, kind: str, title: str) -> Block | None:
    traces: list[charts.Trace] = []
    for number, name in enumerate(evaluated.texts(kind)):
        measured = [label for label in evaluated.labels if evaluated.value(label, name) is not None]
        values = [
            value for label in measured if (value := evaluated.value(label, name)) is not None
        ]
        errors = [evaluated.stderr(label, name) for label in measured]
        labels = [charts.label(label) for label in measured]
        traces.append(charts.line(name.partition("/")[2], labels, values, number, errors))
    if not traces:
        return None
    # A large value right after pruning would flatten all others on a linear axis.
    spread = [value for trace in traces for value in trace["y"] if value > 0]
    wide = kind == "perplexity" and max(spread) > 8 * min(spread)
    scale = {"type": "log", "dtick": "D2"} if wide else {"rangemode": "tozero"}
    axis = charts.axis(title + (" (log scale)" if wide else ""), **scale)
    texts = "; bars are standard errors"
    return Chart(
        charts.figure(traces, {"type": "category"}, axis), title[0].upper() + title[1:] + texts
    )
