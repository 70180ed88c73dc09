"""Section on the candidate shapes of each pruning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from regrow.stages.report import charts
from regrow.stages.report.charts import front, places
from regrow.stages.report.numbers import megabytes, millions, plain
from regrow.stages.report.page import Block, Cell, Chart, Details, Section, Table
from regrow.stages.report.run_folder import Cut, Run

NOTE = (
    "Each shape was cut and scored without training, by its KL to the uncut model on calibration "
    "text that was not used to choose the units. The shape with the lowest KL was taken. If there "
    "are many shapes, only the best of a round go on to the next one, which reads more text. If "
    "the last shapes were distilled, their KL after the given number of tokens decides."
)
SHOWN = 20  # rows of the table, the last round first; the other rows are collapsed
LABELLED = 12  # charts with more points have no labels
GREY = "#8a95a3"

Row = dict[str, Any]


def section(runs: list[Run]) -> Section | None:
    """For each pruning, a table of the candidates, and KL against their costs with Pareto front."""
    blocks: list[Block] = []
    for cut in (cut for run in runs for cut in run.cuts):
        if cut.candidates:
            blocks += _tables(cut)
        if len(cut.candidates) > 1:
            blocks += _charts(cut.candidates)
    return Section("candidates", "Choice of shape", NOTE, blocks) if blocks else None


def _tables(cut: Cut) -> list[Block]:
    ranked = sorted(cut.candidates, key=_rank)
    columns = [column for column in COLUMNS if any(column[1](row) for row in ranked)]
    lengths = sorted({int(n) for row in ranked for n in row.get("distilled", {})})
    head = [cut.name, *(name for name, _ in columns)]
    head += [f"KL, {millions(n)} tokens" for n in lengths]

    def cells(row: Row) -> list[str]:
        values = [show(row) for _, show in columns]
        distilled = row.get("distilled", {})
        return values + [_kl(distilled.get(str(n))) for n in lengths]

    rows = [
        [
            Cell(
                row["name"] + (" (chosen)" if row["chosen"] else ""),
                sizes(row["sizes"], cut.plan.before),
                number=False,
            ),
            *map(Cell, cells(row)),
        ]
        for row in ranked[:SHOWN]
    ]
    chosen = frozenset(n for n, row in enumerate(ranked[:SHOWN]) if row["chosen"])
    tables: list[Block] = [Table(head, rows, chosen)]
    if rest := ranked[SHOWN:]:
        lines = [" · ".join(["cut", *head[1:], "round"])]
        lines += [
            " · ".join(
                [sizes(row["sizes"], cut.plan.before), *cells(row), str(row.get("round", 1))]
            )
            for row in rest
        ]
        tables.append(Details(f"the other {len(rest)} shapes", "\n".join(lines)))
    return tables


def _rank(row: Row) -> tuple[bool, int, int, float]:
    """Sort key: the chosen shape, then longer distillation, later rounds, and lower KL."""
    score = row.get("distilled", {})
    kl = score[max(score, key=int)] if score else row["kl"]
    last = math.inf if kl is None or not math.isfinite(kl) else kl
    return not row["chosen"], -len(score), -row.get("round", 1), last


def _kl(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _milliseconds(key: str) -> Callable[[Row], str]:
    return lambda row: f"{plain(row[key])} ms" if key in row else ""


def _bytes(row: Row) -> str:
    return f"{megabytes(row['bytes'])} {row['format']}" if "bytes" in row else ""


COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("parameters", lambda row: millions(row["parameters"])),
    ("kept", lambda row: f"{row['keep']:.1%}"),
    ("size", _bytes),
    ("RAM", lambda row: megabytes(row["ram"]) if "ram" in row else ""),
    ("prefill", _milliseconds("prefill_ms")),
    ("decode", _milliseconds("decode_ms")),
    ("KL, nats", lambda row: _kl(row["kl"])),
]
"""Header and cell of each column; a column without any value is dropped."""


def sizes(after: dict[str, int], before: dict[str, int]) -> str:
    """Format the changed sizes: `mlp 1536 → 1184, layers 30 → 28`."""
    return ", ".join(f"{dim} {before.get(dim, '?')} → {size}" for dim, size in after.items())


AXES: list[tuple[str, str, Callable[[Row], float]]] = [
    ("keep", "parameters kept, %", lambda row: 100 * row["keep"]),
    ("bytes", "size, MB", lambda row: row["bytes"] / 1e6),
    ("prefill_ms", "prefill of the prompt, ms", lambda row: row["prefill_ms"]),
    ("decode_ms", "decode, ms per token", lambda row: row["decode_ms"]),
]
"""Row key, title and value of each cost to plot the KL against."""


def _charts(rows: list[Row]) -> list[Block]:
    """KL against each cost with at least two shapes; bytes only in a quantized format."""
    plots: list[Block] = []
    for key, title, value in AXES:
        scored = [row for row in rows if key in row and row["kl"] is not None]
        scored = [row for row in scored if math.isfinite(row["kl"])]
        if key == "bytes" and all(row["format"] == "bf16" for row in scored):
            continue  # bytes are twice the number of parameters
        if len(scored) > 1:
            plots.append(_scatter(scored, title, value))
    return plots


def _scatter(rows: list[Row], title: str, value: Callable[[Row], float]) -> Chart:
    last = max(row.get("round", 1) for row in rows)
    kinds = [
        ("earlier rounds", charts.FAINT, 8, [row for row in rows if row.get("round", 1) < last]),
        (
            "last round",
            GREY,
            11,
            [r for r in rows if r.get("round", 1) == last and not r["chosen"]],
        ),
        ("chosen", charts.ACCENT, 14, [row for row in rows if row["chosen"]]),
    ]
    positions = _label_positions(rows, value) if len(rows) <= LABELLED else {}
    traces = [
        _points(name, colour, size, members, value, positions)
        for name, colour, size, members in kinds
        if members
    ]
    # KL is only comparable within one round; repair is only done in the last round.
    best = front([(value(row), row["kl"]) for row in rows if row.get("round", 1) == last])
    traces.insert(0, _line(best))
    x, y = charts.axis(title), charts.axis("KL, nats per token", rangemode="tozero")
    caption = f"KL of untrained shapes over {title}; the line is the Pareto front of the last round"
    return Chart(charts.figure(traces, x, y), caption)


def _line(points: list[tuple[float, float]]) -> charts.Trace:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": charts.ACCENT, "width": 1.5, "shape": "hv", "dash": "dot"},
        "hoverinfo": "skip",
    }


def _points(
    name: str,
    colour: str,
    size: int,
    rows: list[Row],
    value: Callable[[Row], float],
    positions: dict[str, str],
) -> charts.Trace:
    return {
        "type": "scatter",
        "mode": "markers+text" if positions else "markers",
        "name": name,
        "x": [value(row) for row in rows],
        "y": [row["kl"] for row in rows],
        "text": [charts.label(_short(row)) for row in rows],
        "textposition": [positions.get(row["name"], "top center") for row in rows],
        "cliponaxis": False,
        "marker": {"size": size, "color": colour},
        "customdata": [[charts.label(_hover(row))] for row in rows],
        "hovertemplate": "%{customdata[0]}<br>%{x:.4g}, KL %{y:.3f}<extra></extra>",
    }


def _label_positions(rows: list[Row], value: Callable[[Row], float]) -> dict[str, str]:
    """Position of each shape's label next to its point; the axis of the KL starts at 0."""
    low, high = min(map(value, rows)), max(map(value, rows))
    room = 0.07 * (high - low or 1.0)
    top = 1.07 * max(row["kl"] for row in rows) or 1.0
    points = [
        ((value(row) - low + room) / (high - low + 2 * room), row["kl"] / top) for row in rows
    ]
    positions = places(points, [_short(row) for row in rows])
    return {row["name"]: place for row, place in zip(rows, positions, strict=True)}


def _short(row: Row) -> str:
    return charts.clip(row["name"])


def _hover(row: Row) -> str:
    cut = ", ".join(f"{dim} {size}" for dim, size in row["sizes"].items())
    return f"{row['name']}: {cut}; {millions(row['parameters'])}"
