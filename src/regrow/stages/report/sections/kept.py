"""Section on the kept units, layer by layer; for several runs, the sizes around each pruning."""

from __future__ import annotations

from itertools import pairwise

from regrow.plan import PER_LAYER, Plan
from regrow.stages.report import charts
from regrow.stages.report.page import Block, Cell, Chart, Section, Table, text
from regrow.stages.report.run_folder import Cut, Run
from regrow.stages.report.sections.importance import FEW, NAMES, criteria

BINS = 96
NOTE = (
    "All layers keep the same number of units, each layer its own best ones. Dark units are kept, "
    "light units are cut. Blank rows are layers that were removed or have no such units."
)


def section(runs: list[Run]) -> Section | None:
    """For each pruning, a table of sizes, and a map of kept units for each pruned dimension."""
    blocks: list[Block] = []
    for cut in (cut for run in runs for cut in run.cuts):
        blocks.append(_sizes(cut))
        blocks += [_map(cut.plan, dim) for dim in PER_LAYER if _pruned(cut.plan, dim)]
        if (chart := _mass(cut)) is not None:
            blocks.append(chart)
    return Section("kept", "What was kept", NOTE, blocks) if blocks else None


def _pruned(plan: Plan, dim: str) -> bool:
    changed = plan.after.get(dim) != plan.before.get(dim)
    return changed and any(plan.kept(dim, layer) is not None for layer in plan.kept_layers())


def _sizes(cut: Cut) -> Table:
    plan = cut.plan
    rows = [
        [
            text(dim),
            Cell(f"{plan.before[dim]:,}"),
            Cell(f"{plan.after[dim]:,}"),
            Cell(f"{plan.after[dim] / plan.before[dim]:.1%}"),
        ]
        for dim in plan.before
    ]
    changed = frozenset(
        n for n, dim in enumerate(plan.before) if plan.after[dim] != plan.before[dim]
    )
    return Table([cut.name, "before", "after", "kept"], rows, changed)


def shares(plan: Plan, dim: str, bins: int = BINS) -> list[list[float | None]]:
    """Share [layers, bins] of kept units, in bins of neighbouring unit ids.

    The share is None in removed layers and in layers without such units.
    """
    units = plan.before[dim]
    bins = min(bins, units)
    edges = [units * b // bins for b in range(bins + 1)]
    share_LB: list[list[float | None]] = []
    for layer in range(plan.before["layers"]):
        kept_here = plan.kept(dim, layer) if layer in plan.kept_layers() else None
        if kept_here is None:
            share_LB.append([None] * bins)
            continue
        kept = set(kept_here)
        share_LB.append(
            [
                round(sum(unit in kept for unit in range(a, b)) / (b - a), 3)
                for a, b in pairwise(edges)
            ]
        )
    return share_LB


def _map(plan: Plan, dim: str) -> Chart:
    z = shares(plan, dim)
    bins, units = len(z[0]), plan.before[dim]
    starts = [units * b // bins for b in range(bins)]
    heat = charts.heat(starts, list(range(len(z))), z, zmin=0, zmax=1)
    heat["colorbar"]["tickformat"] = ".0%"
    heat["showscale"] = bins < units
    heat["hovertemplate"] = "layer %{y}, from unit %{x}: %{z:.0%} kept<extra></extra>"
    x = charts.axis("unit", **({"dtick": 1} if units <= FEW else {}))
    y = charts.axis("layer", autorange="reversed")
    height = max(220, 10 * len(z) + 90)
    grouped = f", in groups of {units / bins:.0f}" if bins < units else ""
    caption = f"Kept {NAMES[dim]}: {plan.after[dim]} of {units} in each layer{grouped}"
    return Chart(charts.figure([heat], x, y), caption, height)


def _mass(cut: Cut) -> Chart | None:
    """Share of each layer's total score in its kept units; low where pruning removed the most."""
    if cut.profile is None:
        return None
    plan, scored, traces = cut.plan, criteria(cut.profile), []
    for number, dim in enumerate(dim for dim in PER_LAYER if _pruned(plan, dim)):
        if dim not in scored:
            continue
        scores = cut.profile.scores(scored[dim], dim)
        layers = [layer for layer in plan.kept_layers() if plan.kept(dim, layer) is not None]
        values = [
            float(score[plan.kept(dim, layer)].sum() / score.sum().clamp_min(1e-30))
            for layer in layers
            for score in [scores[str(layer)].double()]
        ]
        traces.append(charts.line(NAMES[dim], layers, [round(v, 4) for v in values], number))
    if not traces:
        return None
    y = charts.axis("share of score kept", tickformat=".0%")
    caption = "Share of each layer's importance score in its kept units"
    return Chart(charts.figure(traces, charts.axis("layer"), y), caption, 280)


def sizes(runs: list[Run]) -> Section | None:
    """Sizes before and after each pruning; maps of the kept units are on each run's own page."""
    cuts = [(run.at(cut.name), cut.plan) for run in runs for cut in run.cuts]
    dims = list(dict.fromkeys(dim for _, plan in cuts for dim in plan.before))
    rows = [[text(name), *(_change(plan, dim) for dim in dims)] for name, plan in cuts]
    note = "Sizes before and after; unchanged sizes are in grey."
    return Section("kept", "What was cut", note, [Table(["cut", *dims], rows)]) if rows else None


def _change(plan: Plan, dim: str) -> Cell:
    before, after = plan.before.get(dim), plan.after.get(dim)
    if before is None or after is None:
        return Cell("–")
    if before == after:
        return Cell("", f"{after:,}")
    return Cell(f"{before:,} → {after:,}", f"{after / before:.1%}")
