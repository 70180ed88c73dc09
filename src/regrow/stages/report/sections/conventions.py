"""How each figure was measured."""

from __future__ import annotations

from regrow.stages.report.evaluated import Evaluated, of
from regrow.stages.report.numbers import title
from regrow.stages.report.page import Cell, Section, Table, text
from regrow.stages.report.run_folder import Run


def section(runs: list[Run]) -> Section | None:
    """Per figure its convention, the number of items, and what differs between models."""
    found = of(runs)
    if found is None:
        return None
    rows = []
    for name in found.names:
        convention = found.convention(name)
        small = " · ".join(_own(found, name, convention))
        rows.append(
            [text(title(name)), Cell(convention or "–", small, number=False), _count(found, name)]
        )
    table = Table(["figure", "how it was measured", "n"], rows)
    return Section("conventions", "Conventions", "", [table]) if rows else None


def _own(found: Evaluated, name: str, shared: str) -> list[str]:
    """`model: the part of its convention that is not shared`."""
    rows = [(label, found.figure(label, name)) for label in found.labels]
    return [
        f"{label}: {rest}"
        for label, row in rows
        if row and (rest := row.get("convention", "").removeprefix(shared).lstrip("; "))
    ]


def _count(found: Evaluated, name: str) -> Cell:
    rows = [found.figure(label, name) for label in found.labels]
    counts = sorted({row["n"] for row in rows if row is not None and "n" in row})
    return Cell(" / ".join(f"{n:,}" for n in counts) or "–")
