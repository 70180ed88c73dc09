"""What was written for other programs: quantized folders and exported files."""

from __future__ import annotations

from typing import Any

from regrow.stages.report.numbers import megabytes, plain
from regrow.stages.report.page import Cell, Section, Table, text
from regrow.stages.report.run_folder import Run

STAGES = ("quantize", "export")
BYTES = ("bytes", "file_bytes")
BITS = ("bits per parameter", "bits_per_weight")
NOTE = "As each stage measured it; the KL is to the model before, on its own text."


def section(runs: list[Run]) -> Section | None:
    """A row per quantize and export stage: size, bits per weight, and every other figure."""
    rows = []
    for run in runs:
        for name, made in run.manifests.items():
            if made["stage"] in STAGES:
                rows.append([text(run.at(name)), *_cells(made)])
    table = Table(["stage", "format", "size", "bits per weight", "more"], rows)
    return Section("stored", "Quantized and exported", NOTE, [table]) if rows else None


def _cells(made: dict[str, Any]) -> list[Cell]:
    config = made.get("config", {})
    kind = str(config.get("scheme", config.get("type", "")))
    figures = {f["name"]: f for f in made.get("figures", [])}
    size = next((figures[name]["value"] for name in BYTES if name in figures), None)
    bits = next((figures[name]["value"] for name in BITS if name in figures), None)
    rest = [f for name, f in figures.items() if name not in (*BYTES, *BITS)]
    return [
        Cell(kind, str(config.get("method", "")), number=False),
        Cell("–" if size is None else megabytes(size)),
        Cell("–" if bits is None else f"{bits:.2f}"),
        Cell("", ", ".join(map(_figure, rest)), number=False),
    ]


def _figure(row: dict[str, Any]) -> str:
    value = megabytes(row["value"]) if row.get("unit") == "bytes" else plain(row["value"])
    unit = "" if row.get("unit") == "bytes" else row.get("unit", "")
    return f"{row['name']} {value} {unit}".strip()
