"""The shapes that were tried before one was cut."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

from regrow.stages.report import charts
from regrow.stages.report.blocks import Block, Cell, Chart, Section, Table, text
from regrow.stages.report.numbers import millions
from regrow.stages.report.run_folder import Cut, Run

NOTE = (
    "Each shape was cut and scored untrained, by its KL to the uncut model on calibration text "
    "that the choice of units had not seen; the lowest was taken. Of many shapes only the best go "
    "on to the next round, which reads more text."
)
SHOWN = 20  # rows of the table, the last round's first
LABELLED = 12  # points that still have room for a name


def section(run: Run) -> Section | None:
    """Per pruning a table of the candidates, and a scatter of size and KL."""
    blocks: list[Block] = []
    for cut in run.cuts:
        if cut.candidates:
            blocks.append(_table(cut))
        if len(cut.candidates) > 1:
            blocks.append(_scatter(cut.candidates))
    return Section("candidates", "Choice of shape", NOTE, blocks) if blocks else None


def _table(cut: Cut) -> Table:
    ranked = sorted(cut.candidates, key=lambda row: (-row.get("round", 1), row["kl"]))[:SHOWN]
    rows = [
        [
            text(row["name"] + (" (chosen)" if row["chosen"] else "")),
            text(sizes(row["sizes"], cut.plan.before)),
            Cell(millions(row["parameters"])),
            Cell(f"{row['keep']:.1%}"),
            Cell(f"{row['kl']:.3f}"),
        ]
        for row in ranked
    ]
    chosen = frozenset(n for n, row in enumerate(ranked) if row["chosen"])
    left_out = len(cut.candidates) - len(ranked)
    name = f"{cut.name} (and {left_out} more)" if left_out else cut.name
    return Table([name, "cut", "parameters", "kept", "KL, nats"], rows, chosen)


def sizes(after: dict[str, int], before: dict[str, int]) -> str:
    """What changes: `mlp 1536 → 1184, layers 30 → 28`."""
    return ", ".join(f"{dim} {before.get(dim, '?')} → {size}" for dim, size in after.items())


def _scatter(rows: list[dict[str, Any]]) -> Chart:
    trace = {
        "type": "scatter",
        "mode": "markers+text" if len(rows) <= LABELLED else "markers",
        "x": [100 * row["keep"] for row in rows],
        "y": [row["kl"] for row in rows],
        "text": [charts.label(shorten(row["name"], 28, placeholder="…")) for row in rows],
        "textposition": "top center",
        "cliponaxis": False,
        "marker": {
            "size": 12,
            "color": [charts.ACCENT if row["chosen"] else "#aab3bd" for row in rows],
        },
        "hovertemplate": "%{text}: %{x:.1f} % kept, KL %{y:.3f}<extra></extra>",
    }
    x = charts.axis("parameters kept, %", ticksuffix=" %")
    y = charts.axis("KL, nats per token", rangemode="tozero")
    return Chart(charts.figure([trace], x, y), "Candidates; the one in colour was cut")
