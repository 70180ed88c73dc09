"""Reads the files of a run folder; every file is optional."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from regrow import stage_dir
from regrow.errors import UserError
from regrow.plan import FILE, Plan
from regrow.profile_folder import INFO, SCORES, Profile

EVALUATION = "evaluation.json"
CANDIDATES = "candidates.json"
METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Cut:
    """One pruning: its plan, the candidates, and the profile with the scores of the units."""

    name: str
    plan: Plan
    candidates: list[dict[str, Any]]
    profile: Profile | None


@dataclass(frozen=True)
class Run:
    """Contents of a run folder, in the order of its stages."""

    folder: Path
    name: str = ""
    """Name of the run, which prefixes its models; empty for a page about one run."""
    recipe: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    measured: dict[str, str] = field(default_factory=dict)
    """Hashes of the evaluated inputs, by `model LABEL`, `data`, `text NAME`, `task NAME`."""
    cuts: list[Cut] = field(default_factory=list)
    profiles: dict[str, Profile] = field(default_factory=dict)

    def at(self, text: str) -> str:
        """Prefix `text` with the run's name if there are several runs."""
        return f"{self.name} · {text}" if self.name else text

    @property
    def teacher(self) -> str:
        """Label of the teacher in the evaluation."""
        return str((self.evaluation or {}).get("teacher") or "")


def gather(folders: list[Path], compare: Sequence[str]) -> list[Run]:
    """Read the runs of a page, and the evaluation of each FOLDER or NAME=FOLDER in `compare`.

    If there are several runs, their names come from their folders. Raises the UserErrors of `read`,
    and UserError for a folder in `compare` without an evaluation.
    """
    compared = {folder: name for name, folder in map(split, compare)}
    names = {**_names([*folders, *compared]), **{f: name for f, name in compared.items() if name}}
    runs = [read(folder) for folder in folders]
    if len(runs) > 1:
        runs = [replace(run, name=names[run.folder]) for run in runs]
    others = []
    for folder in compared:
        run = read(folder)
        if run.evaluation is None:
            raise UserError(
                f"{folder} has no {EVALUATION}: run regrow evaluate first, and give --compare its "
                "output folder"
            )
        others.append(Run(folder, names[folder], evaluation=run.evaluation, measured=run.measured))
    return runs + others


def split(argument: str) -> tuple[str, Path]:
    """Split `NAME=FOLDER` into name and folder; the name is empty if only a folder is given."""
    name, equals, folder = argument.partition("=")
    return (name, Path(folder)) if equals else ("", Path(argument))


def _names(folders: list[Path]) -> dict[Path, str]:
    """The shortest path endings that distinguish the folders."""
    parts = {folder: folder.resolve().parts for folder in folders}
    if len(set(parts.values())) < len(folders):
        raise UserError("a run is given twice: give each run once")
    for count in range(1, max(map(len, parts.values())) + 1):
        names = {folder: "/".join(part[-count:]) for folder, part in parts.items()}
        if len(set(names.values())) == len(folders):
            return names
    raise AssertionError("paths that differ have parts that differ")


def read(folder: Path) -> Run:
    """Read a run folder; raises UserError if it is not a run or a file is broken."""
    recipe = _text(folder / RECIPE)
    named = _named_by(recipe)
    stages = _stage_folders(folder, named)
    metrics = [r for r in rows(folder / METRICS) if named is None or r["stage"] in named]
    if not stages and not metrics:
        raise UserError(
            f"{folder} has no run: expected stages/ or {METRICS} in it; give the folder that "
            "regrow run wrote"
        )
    profiles = {path.name: Profile(path) for path in stages if (path / INFO).exists()}
    manifests = {path.name: manifest for path in stages if (manifest := stage_dir.read(path))}
    evaluated = next((p for p in reversed(stages) if (p / EVALUATION).exists()), None)
    inputs = {} if evaluated is None else manifests.get(evaluated.name, {}).get("inputs", {})
    return Run(
        folder=folder,
        recipe=recipe,
        metrics=metrics or [row for path in stages for row in rows(path / METRICS)],
        manifests=manifests,
        evaluation=None if evaluated is None else _json(evaluated / EVALUATION),
        measured=inputs,
        cuts=_cuts(stages, profiles),
        profiles={name: manifest for name, manifest in profiles.items() if has_scores(manifest)},
    )


def has_scores(profile: Profile) -> bool:
    """Whether the score file still exists; a run may have deleted its large files."""
    return (profile.folder / SCORES).exists()


def _stage_folders(folder: Path, named: set[str] | None) -> list[Path]:
    """Folders stages/NN-name/ in order, or the folder itself if it belongs to a single stage.

    Folders that the recipe does not name are skipped; they come from an earlier recipe.
    """
    folders = sorted(path for path in folder.glob("stages/*") if path.is_dir())
    stages = [
        path
        for path in folders
        if (path / stage_dir.NAME).exists()
        and (named is None or path.name.removesuffix("-repaired") in named)
    ]
    return stages or ([folder] if (folder / stage_dir.NAME).exists() else [])


def _named_by(recipe: str) -> set[str] | None:
    """NN-name of each stage of a recipe; None if there is no recipe."""
    if not recipe:
        return None
    stages = yaml.safe_load(recipe)["stages"]
    names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in stages]
    return {f"{number:02d}-{name}" for number, name in enumerate(names, start=1)}


def _cuts(stages: list[Path], profiles: dict[str, Profile]) -> list[Cut]:
    """Find the prunings; a plan that was applied twice (with and without repair) counts once."""
    cuts: dict[str, Cut] = {}
    profile: Profile | None = None
    for path in stages:
        profile = profiles.get(path.name, profile)
        manifest = stage_dir.read(path)
        # A distilled model also contains its plan.
        if manifest is None or manifest["stage"] != "prune" or not (path / FILE).exists():
            continue
        plan = Plan.read(path / FILE)
        table = _json(path / CANDIDATES) if (path / CANDIDATES).exists() else []
        earlier = cuts.get(plan.digest())
        if earlier is not None:
            table = table or earlier.candidates
        name = path.name if earlier is None else earlier.name
        usable = profile is not None and has_scores(profile)
        matches = usable and profile is not None and profile.fingerprint == plan.fingerprint
        cuts[plan.digest()] = Cut(name, plan, table, profile if matches else None)
    return list(cuts.values())


def rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; an incomplete last line of an interrupted run is skipped."""
    lines = [line for line in _text(path).splitlines() if line.strip()]
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON lines: {error}; run its stage again") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}; run its stage again") from None


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
