"""What was cut, of several runs: one row per pruning, one column per dimension."""

from __future__ import annotations

from regrow.plan import Plan
from regrow.stages.report.page import Cell, Section, Table, text
from regrow.stages.report.run_folder import Run


def section(runs: list[Run]) -> Section | None:
    """Sizes before and after each pruning; the maps of kept units are on the runs' own pages."""
    cuts = [(run.at(cut.name), cut.plan) for run in runs for cut in run.cuts]
    dims = list(dict.fromkeys(dim for _, plan in cuts for dim in plan.before))
    rows = [[text(name), *(_cell(plan, dim) for dim in dims)] for name, plan in cuts]
    note = "Sizes before and after; what kept its size is in grey."
    return Section("kept", "What was cut", note, [Table(["cut", *dims], rows)]) if rows else None


def _cell(plan: Plan, dim: str) -> Cell:
    before, after = plan.before.get(dim), plan.after.get(dim)
    if before is None or after is None:
        return Cell("–")
    if before == after:
        return Cell("", f"{after:,}")
    return Cell(f"{before:,} → {after:,}", f"{after / before:.1%}")
