"""Speed and memory: per setting of batch and prompt a table, and rates over the settings."""

from __future__ import annotations

import re

from regrow.stages.report import charts
from regrow.stages.report.evaluated import Evaluated, of
from regrow.stages.report.numbers import SPEED, figure, title
from regrow.stages.report.page import Block, Cell, Chart, Section, Table, text
from regrow.stages.report.run_folder import Run

RATES = ("prefill", "decode")
SETTING = re.compile(r"prompt of (\d+)\b.*?batch (\d+)")
NOTE = (
    "Medians, and 95th percentiles as p95; × is the speed over the teacher's, and ÷ ratio of "
    "FLOPs what that is of the saving in operations."
)


def section(runs: list[Run]) -> Section | None:
    """A table per batch size and prompt length; nothing when the first table has all there is."""
    found = of(runs)
    if found is None:
        return None
    settings: dict[str, list[str]] = {}
    for name in found.names:
        kind, _, setting = name.partition("/")
        if kind in SPEED:
            settings.setdefault(setting, []).append(name)
    if set(settings.get("", [])) <= set(RATES) and len(settings) < 2:
        return None
    blocks: list[Block] = []
    if len(settings) > 1:
        blocks += [_chart(found, kind, list(settings)) for kind in RATES]
    blocks += [_table(found, setting, names) for setting, names in settings.items()]
    return Section("speed", "Speed and memory", NOTE, blocks)


def _table(found: Evaluated, setting: str, names: list[str]) -> Table:
    rows = [[text(label), *(_cell(found, label, name) for name in names)] for label in found.labels]
    head = [title(name.partition("/")[0]) for name in names]
    return Table([f"batch × prompt {_called(found, setting)}", *head], rows)


def _called(found: Evaluated, setting: str) -> str:
    """`1 x 512`; the first setting's name is in its convention alone."""
    if setting:
        return setting
    rows = [row for label in found.labels if (row := found.figure(label, "prefill")) is not None]
    told = [SETTING.search(row.get("convention", "")) for row in rows[:1]]
    return next((f"{one[2]} x {one[1]}" for one in told if one), "as said below")


def _cell(found: Evaluated, label: str, name: str) -> Cell:
    value = found.value(label, name)
    return Cell("–" if value is None else figure(name, value))


def _chart(found: Evaluated, kind: str, settings: list[str]) -> Chart:
    shown = [charts.label(_called(found, setting)) for setting in settings]
    traces = []
    for number, label in enumerate(found.drawn):
        values = [found.value(label, f"{kind}/{s}" if s else kind) for s in settings]
        there = [(x, y) for x, y in zip(shown, values, strict=True) if y is not None]
        if there:
            traces.append(charts.line(label, [x for x, _ in there], [y for _, y in there], number))
    y = charts.axis("tokens/s", rangemode="tozero")
    x = charts.axis("batch × prompt", type="category")
    return Chart(charts.figure(traces, x, y), f"{title(kind)} by batch size and prompt", half=True)
