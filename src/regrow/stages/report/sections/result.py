"""Sections with the result as a sentence and a table, and the models in other formats."""

from __future__ import annotations

from typing import Any

from regrow.checkpoint.bitmask import SERVED
from regrow.sparsity import zeros
from regrow.stages.report import numbers
from regrow.stages.report.evaluated import Evaluated, of
from regrow.stages.report.numbers import QUALITY, figure, megabytes, millions, plain, title
from regrow.stages.report.page import Cell, Section, Table, text
from regrow.stages.report.run_folder import Run

SPEED = ("prefill", "decode")


def section(runs: list[Run]) -> Section | None:
    """A table with a row per model and a column per figure, with ratios to the teacher."""
    evaluated = of(runs)
    if evaluated is None:
        return None
    kinds = {*QUALITY, *(evaluated.metrics - {*numbers.SPEED})}
    names = [n for n in evaluated.names if n.partition("/")[0] in kinds or n in SPEED]
    if not names:
        return None
    rows = [
        [text(label), *(_cell(evaluated, label, name) for name in names)]
        for label in evaluated.labels
    ]
    marked = frozenset(evaluated.labels.index(label) for label in evaluated.results)
    table = Table(["model", *map(title, names)], rows, marked)
    notes = [
        run.at(f"{sentence[0].upper()}{sentence[1:]}")
        for run in runs
        for sentence in (run.evaluation or {}).get("notes", ())
    ]
    note = " ".join([_note(evaluated, names), *notes])
    return Section("result", "Size, quality and speed", note, [table])


def _note(evaluated: Evaluated, names: list[str]) -> str:
    references = set(evaluated.references.values())
    to = evaluated.reference if len(references) == 1 else "the teacher of the same evaluation"
    note = f"Small print: standard error or interval of 95 %, and the ratio to {to}."
    unlike = [
        f"{title(name)} (different {aspects})"
        for name in names
        if (aspects := evaluated.unlike(name))
    ]
    if unlike:
        note += f" Measured differently, so do not compare across runs: {', '.join(unlike)}."
    return note


def headline(runs: list[Run]) -> str:
    """The result in one sentence; for several runs, the share of parameters and the perplexity."""
    if len(runs) == 1 or not runs[0].name:
        return _of_one(runs[0])
    evaluated = of(runs)
    if evaluated is None:
        return f"{len(runs)} runs, none of them evaluated"
    return "; ".join(_short(evaluated, label) for label in evaluated.results)


def _short(evaluated: Evaluated, label: str) -> str:
    size = evaluated.ratio(label, "parameters")
    words = [f"{size:.1%} of the parameters"] if size is not None else []
    name = next(iter(evaluated.texts("perplexity")), None)
    value = None if name is None else evaluated.value(label, name)
    if name is not None and value is not None:
        words.append(f"perplexity ({name.partition('/')[2]}) {plain(value)}")
    return f"{label}: {', '.join(words)}" if words else label


def _of_one(run: Run) -> str:
    evaluated = of([run])
    if evaluated is None:
        return _from_plan(run)
    (result,) = evaluated.results
    parts = [_size(evaluated, result)]
    name = next(iter(evaluated.texts("perplexity")), None)
    if name is not None:
        steps = [(label, evaluated.value(label, name)) for label in evaluated.labels]
        values = [
            plain(value) + ("" if label == evaluated.reference else f" {label}")
            for label, value in steps
            if value is not None
        ]
        parts.append(f"perplexity ({name.partition('/')[2]}) {' → '.join(values)}")
    parts += [
        f"{does} {ratio:.2f}× as fast"
        for kind, does in (("prefill", "reads prompts"), ("decode", "generates"))
        if (ratio := evaluated.ratio(result, kind)) is not None
    ]
    return "; ".join(part for part in parts if part)


def _size(evaluated: Evaluated, result: str) -> str:
    after = evaluated.value(result, "parameters")
    before = evaluated.value(evaluated.reference, "parameters")
    if after is None or before is None:
        return ""
    return f"{millions(after)} of {millions(before)} parameters kept ({after / before:.1%})"


def _from_plan(run: Run) -> str:
    for name, manifest in reversed(run.manifests.items()):
        for row in manifest["figures"]:
            if row["name"] == "kept share of parameters":
                return f"{row['value']:.1%} of the parameters kept ({name}); not evaluated"
    return "Not evaluated yet"


def _cell(evaluated: Evaluated, label: str, name: str) -> Cell:
    row = evaluated.figure(label, name)
    if row is None:
        return Cell("–")
    ratio = evaluated.ratio(label, name)
    small = [error] if (error := _error(name, row)) else []
    kept = evaluated.figure(label, name.replace("/", "_kept/", 1))
    if kept is not None and kept.get("interval"):
        small.append(f"{plain(kept['value'])}×, {_error(kept['name'], kept)}")
    elif ratio is not None:
        small.append(f"{ratio:.2f}×" if ratio < 100 else f"{ratio:,.0f}×")
    return Cell(figure(name, row["value"]), " · ".join(small))


def _error(name: str, row: dict[str, Any]) -> str:
    """The confidence interval or, without one, the standard error; empty if there is neither."""
    if row.get("interval"):
        return " to ".join(figure(name, limit) for limit in row["interval"])
    return f"± {figure(name, row['stderr'])}" if row.get("stderr") else ""


STORED_BY = ("sparsify", "quantize", "export")
BYTES = ("bytes", "file_bytes")
BITS = ("bits per parameter", "bits_per_weight")
ZEROS_NOTE = (
    f"Zeros make the folder no smaller and the model no faster: {SERVED}. regrow export --type "
    "bitmask leaves them out of the files."
)
STORED_NOTE = (
    "As measured by each stage; the KL is to the model before it, on the stage's own text."
)


def stored(runs: list[Run]) -> Section | None:
    """A row per sparsify, quantize and export stage: size, bits per weight, all other figures."""
    rows = []
    for run in runs:
        for name, manifest in run.manifests.items():
            if manifest["stage"] in STORED_BY:
                rows.append([text(run.at(name)), *_stored_cells(manifest)])
    table = Table(["stage", "format", "size", "bits per weight", "more"], rows)
    if not rows:
        return None
    manifests = [manifest for run in runs for manifest in run.manifests.values()]
    sparse = any(zeros.NOTE in manifest for manifest in manifests)
    note = f"{STORED_NOTE} {ZEROS_NOTE}" if sparse else STORED_NOTE
    return Section("stored", "Sparse, quantized and exported", note, [table])


def _stored_cells(manifest: dict[str, Any]) -> list[Cell]:
    config = manifest.get("config", {})
    kinds = (config.get(key) for key in ("scheme", "type"))
    kind = str(next(filter(None, kinds), manifest.get(zeros.NOTE, "")))
    figures = {f["name"]: f for f in manifest.get("figures", [])}
    size = next((figures[name]["value"] for name in BYTES if name in figures), None)
    bits = next((figures[name]["value"] for name in BITS if name in figures), None)
    rest = [f for name, f in figures.items() if name not in (*BYTES, *BITS)]
    return [
        Cell(kind, str(config.get("method", "")), number=False),
        Cell("–" if size is None else megabytes(size)),
        Cell("–" if bits is None else f"{bits:.2f}"),
        Cell("", ", ".join(map(_stored_figure, rest)), number=False),
    ]


def _stored_figure(row: dict[str, Any]) -> str:
    value = megabytes(row["value"]) if row.get("unit") == "bytes" else plain(row["value"])
    unit = "" if row.get("unit") == "bytes" else row.get("unit", "")
    return f"{row['name']} {value} {unit}".strip()
