"""Distillation: the loss, and the held-out KL, over tokens."""

from __future__ import annotations

import math
from typing import Any

from regrow.stages.report import charts
from regrow.stages.report.blocks import Block, Chart, Section
from regrow.stages.report.run_folder import Run

POINTS = 800
SMOOTHING = 0.1
"""Weight of a new step in the running mean."""


def section(run: Run) -> Section | None:
    """Per distillation the training loss (steps and running mean) and what held-out text says."""
    stages = dict.fromkeys(str(row["stage"]) for row in run.metrics if "stage" in row)
    blocks: list[Block] = []
    for stage in stages:
        rows = [row for row in run.metrics if row.get("stage") == stage]
        if (chart := _chart(rows, stage)) is not None:
            blocks.append(chart)
    note = "Training loss and KL on held-out text, in nats per scored token. Lower is better."
    return Section("training", "Distillation", note, blocks) if blocks else None


def _chart(rows: list[dict[str, Any]], stage: str) -> Chart | None:
    steps = _pairs(rows, "loss")
    traces: list[charts.Trace] = []
    if steps:
        thin = steps[:: max(1, len(steps) // POINTS)]
        faint = {**charts.line("loss", *_columns(thin), number=1), "mode": "lines", "opacity": 0.35}
        mean = charts.line("loss, running mean", *_columns(_running_mean(steps)), number=1)
        traces += [faint, {**mean, "mode": "lines"}]
    heldout = _pairs(rows, "heldout_kl")
    if heldout:
        traces.append(charts.line("held-out KL", *_columns(heldout), number=0))
    if not traces:
        return None
    y = charts.axis("nats per token", rangemode="tozero")
    figure = charts.figure(traces, charts.axis("tokens", rangemode="tozero"), y)
    seconds = max((float(row.get("seconds", 0.0)) for row in rows), default=0.0)
    tokens = max(float(row.get("tokens", 0)) for row in rows)
    return Chart(figure, f"{stage}: {tokens:,.0f} tokens, last process {seconds:,.0f} s")


def _pairs(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(tokens, value) of the rows that have it; a loss that became NaN ends the curve."""
    found = [(row["tokens"], row[name]) for row in rows if name in row and "tokens" in row]
    return [(tokens, round(value, 5)) for tokens, value in found if math.isfinite(value)]


def _running_mean(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean, started at the first value; thinned to POINTS."""
    found = []
    mean = pairs[0][1]
    for tokens, value in pairs:
        mean += SMOOTHING * (value - mean)
        found.append((tokens, round(mean, 5)))
    return found[:: max(1, len(found) // POINTS)]


def _columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]
