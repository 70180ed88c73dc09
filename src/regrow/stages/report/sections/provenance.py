"""The manifest: what ran, on what, with which versions."""

from __future__ import annotations

import json
from typing import Any

from regrow.stages.report.numbers import duration, plain
from regrow.stages.report.page import Block, Cell, Details, Section, Table, text
from regrow.stages.report.run_folder import Run

FIRST = ("stage", "config", "inputs", "figures", "versions", "machine", "seconds", "finished")


def section(runs: list[Run]) -> Section | None:
    """A table of the stages, then everything their manifests say, folded away."""
    blocks: list[Block] = []
    made = {run.at(name): found for run in runs for name, found in run.manifests.items()}
    if made:
        blocks.append(_table(made))
        blocks += [Details(f"Stage {name}", _readable(found)) for name, found in made.items()]
    blocks += [Details(run.at("Recipe"), run.recipe.strip()) for run in runs if run.recipe]
    return Section("provenance", "Manifest", _versions(made), blocks) if blocks else None


def _table(manifests: dict[str, dict[str, Any]]) -> Table:
    rows = [
        [
            text(name),
            text(str(made.get("digest", ""))[:12]),
            text(", ".join(_figure(row) for row in made.get("figures", [])[:3]) or "–"),
            Cell(duration(made.get("seconds", 0.0))),
            text(str(made.get("finished", "")).replace("T", " ")),
        ]
        for name, made in manifests.items()
    ]
    return Table(["stage", "digest", "figures", "took", "finished"], rows)


def _figure(row: dict[str, Any]) -> str:
    return f"{row['name']} {plain(row['value'])} {row.get('unit', '')}".strip()


def _versions(manifests: dict[str, dict[str, Any]]) -> str:
    """Versions and machine of the last stage, and the sum of all stages' time."""
    if not manifests:
        return ""
    last = list(manifests.values())[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last.get("versions", {}).items())
    machine = " ".join(last.get("machine", {}).values())
    total = duration(sum(made.get("seconds", 0.0) for made in manifests.values()))
    return f"{total} in all. Made with {versions} on {machine}."


def _readable(made: dict[str, Any]) -> str:
    """The manifest as JSON, the parts that matter first."""
    keys = [key for key in FIRST if key in made] + [key for key in made if key not in FIRST]
    return json.dumps({key: made[key] for key in keys}, indent=2, ensure_ascii=False)
