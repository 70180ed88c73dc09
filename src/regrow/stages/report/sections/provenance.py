"""Sections on the stages, inputs and versions of a run, and on the conventions of its figures."""

from __future__ import annotations

import json
from typing import Any

from regrow.stages.report.evaluated import Evaluated, of
from regrow.stages.report.numbers import duration, plain, title
from regrow.stages.report.page import Block, Cell, Details, Section, Table, text
from regrow.stages.report.run_folder import Run

FIRST = ("stage", "config", "inputs", "figures", "versions", "machine", "seconds", "finished")


def section(runs: list[Run]) -> Section | None:
    """A table of the stages, and the collapsed contents of their manifests."""
    blocks: list[Block] = []
    manifests = {run.at(name): manifest for run in runs for name, manifest in run.manifests.items()}
    if manifests:
        blocks.append(_table(manifests))
        blocks += [
            Details(f"Stage {name}", _readable(manifest)) for name, manifest in manifests.items()
        ]
    blocks += [Details(run.at("Recipe"), run.recipe.strip()) for run in runs if run.recipe]
    return Section("provenance", "Manifest", _versions(manifests), blocks) if blocks else None


def _table(manifests: dict[str, dict[str, Any]]) -> Table:
    rows = [
        [
            text(name),
            text(str(manifest.get("digest", ""))[:12]),
            text(", ".join(_figure(row) for row in manifest.get("figures", [])[:3]) or "–"),
            Cell(duration(manifest.get("seconds", 0.0))),
            text(str(manifest.get("finished", "")).replace("T", " ")),
        ]
        for name, manifest in manifests.items()
    ]
    return Table(["stage", "digest", "figures", "took", "finished"], rows)


def _figure(row: dict[str, Any]) -> str:
    return f"{row['name']} {plain(row['value'])} {row.get('unit', '')}".strip()


def _versions(manifests: dict[str, dict[str, Any]]) -> str:
    """Total time of all stages, and the versions and machine of the last stage."""
    if not manifests:
        return ""
    last = list(manifests.values())[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last.get("versions", {}).items())
    machine = " ".join(last.get("machine", {}).values())
    total = duration(sum(manifest.get("seconds", 0.0) for manifest in manifests.values()))
    return f"{total} in all. Made with {versions} on {machine}."


def _readable(manifest: dict[str, Any]) -> str:
    """The manifest as JSON, with the keys in FIRST first."""
    keys = [key for key in FIRST if key in manifest] + [key for key in manifest if key not in FIRST]
    return json.dumps({key: manifest[key] for key in keys}, indent=2, ensure_ascii=False)


def conventions(runs: list[Run]) -> Section | None:
    """For each figure: its convention, the number of items, and differences between models."""
    evaluated = of(runs)
    if evaluated is None:
        return None
    rows = []
    for name in evaluated.names:
        convention = evaluated.convention(name)
        differences = " · ".join(_model_parts(evaluated, name, convention))
        rows.append(
            [
                text(title(name)),
                Cell(convention or "–", differences, number=False),
                _count(evaluated, name),
            ]
        )
    table = Table(["figure", "how it was measured", "n"], rows)
    return Section("conventions", "Conventions", "", [table]) if rows else None


def _model_parts(evaluated: Evaluated, name: str, shared: str) -> list[str]:
    """For each model, `model: ` and the part of its convention that is not shared."""
    rows = [(label, evaluated.figure(label, name)) for label in evaluated.labels]
    return [
        f"{label}: {rest}"
        for label, row in rows
        if row and (rest := row.get("convention", "").removeprefix(shared).lstrip("; "))
    ]


def _count(evaluated: Evaluated, name: str) -> Cell:
    rows = [evaluated.figure(label, name) for label in evaluated.labels]
    counts = sorted({row["n"] for row in rows if row is not None and "n" in row})
    return Cell(" / ".join(f"{n:,}" for n in counts) or "–")
