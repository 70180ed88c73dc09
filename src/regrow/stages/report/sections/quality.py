"""Quality from step to step, as lines."""

from __future__ import annotations

from regrow.stages.report import charts
from regrow.stages.report.evaluated import Evaluated, of
from regrow.stages.report.page import Block, Chart, Section
from regrow.stages.report.run_folder import Run


def section(runs: list[Run]) -> Section | None:
    """Perplexity and KL over the models of the first run, a line per text."""
    found = of(runs[:1])
    if found is None or len(found.labels) < 2:
        return None
    blocks = [
        chart
        for kind, title in (
            ("perplexity", "perplexity"),
            ("kl", "KL to the teacher, nats per token"),
        )
        if (chart := _chart(found, kind, title)) is not None
    ]
    if not blocks:
        return None
    return Section("quality", "Quality, step by step", "Lower is better.", blocks)


def _chart(found: Evaluated, kind: str, title: str) -> Block | None:
    traces: list[charts.Trace] = []
    for number, name in enumerate(found.texts(kind)):
        there = [label for label in found.labels if found.value(label, name) is not None]
        values = [value for label in there if (value := found.value(label, name)) is not None]
        errors = [found.stderr(label, name) for label in there]
        labels = [charts.label(label) for label in there]
        traces.append(charts.line(name.partition("/")[2], labels, values, number, errors))
    if not traces:
        return None
    # A collapse right after the cut would flatten everything else on a linear axis.
    spread = [value for trace in traces for value in trace["y"] if value > 0]
    wide = kind == "perplexity" and max(spread) > 8 * min(spread)
    scale = {"type": "log", "dtick": "D2"} if wide else {"rangemode": "tozero"}
    axis = charts.axis(title + (" (log scale)" if wide else ""), **scale)
    texts = "; bars are standard errors"
    return Chart(
        charts.figure(traces, {"type": "category"}, axis), title[0].upper() + title[1:] + texts
    )
