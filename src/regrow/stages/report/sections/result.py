"""The result in one sentence, and the models side by side in one table."""

from __future__ import annotations

from regrow.stages.report.blocks import Cell, Section, Table, text
from regrow.stages.report.evaluated import Evaluated, of
from regrow.stages.report.numbers import figure, millions, plain, title
from regrow.stages.report.run_folder import Run


def section(run: Run) -> Section | None:
    """One row per model, one column per figure, with the ratio to the teacher."""
    found = of(run)
    if found is None:
        return None
    rows = [
        [text(label), *(_cell(found, label, name) for name in found.names)]
        for label in found.labels
    ]
    table = Table(["model", *map(title, found.names)], rows, frozenset({len(rows) - 1}))
    note = f"Small print: standard error, and the ratio to {found.reference}."
    return Section("result", "Size, quality and speed", note, [table])


def headline(run: Run) -> str:
    """What came out, in a sentence; from the plan alone when nothing was evaluated."""
    found = of(run)
    if found is None:
        return _from_plan(run)
    parts = [_size(found)]
    name = next(iter(found.texts("perplexity")), None)
    if name is not None:
        steps = [(label, found.value(label, name)) for label in found.labels]
        values = [
            plain(value) + ("" if label == found.reference else f" {label}")
            for label, value in steps
            if value is not None
        ]
        parts.append(f"perplexity ({name.partition('/')[2]}) {' → '.join(values)}")
    parts += [
        f"{does} {ratio:.2f}× as fast"
        for kind, does in (("prefill", "reads prompts"), ("decode", "generates"))
        if (ratio := found.ratio(found.result, kind)) is not None
    ]
    return "; ".join(part for part in parts if part)


def _size(found: Evaluated) -> str:
    after = found.value(found.result, "parameters")
    before = found.value(found.reference, "parameters")
    if after is None or before is None:
        return ""
    return f"{millions(after)} of {millions(before)} parameters kept ({after / before:.1%})"


def _from_plan(run: Run) -> str:
    for name, made in reversed(run.manifests.items()):
        for row in made["figures"]:
            if row["name"] == "kept share of parameters":
                return f"{row['value']:.1%} of the parameters kept ({name}); not evaluated"
    return "Not evaluated yet"


def _cell(found: Evaluated, label: str, name: str) -> Cell:
    row = found.figure(label, name)
    if row is None:
        return Cell("–")
    ratio = found.ratio(label, name)
    small = [f"± {figure(name, row['stderr'])}"] if row.get("stderr") else []
    if ratio is not None:
        small.append(f"{ratio:.2f}×" if ratio < 100 else f"{ratio:,.0f}×")
    return Cell(figure(name, row["value"]), " · ".join(small))
