"""Evaluations of one or several runs as one: models by label, figures by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any

from regrow.stages.report.numbers import in_order
from regrow.stages.report.run_folder import Run

Figure = dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """`labels` in order, those of several runs as `run · model`."""

    labels: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    """By label and name."""
    generations: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """By label."""
    references: dict[str, str] = field(default_factory=dict)
    """By label the model that ratios are taken to: its evaluation's teacher or first model."""
    runs: dict[str, Run] = field(default_factory=dict)
    """By label."""

    @property
    def reference(self) -> str:
        """The model that ratios of the first run are taken to."""
        return self.references[self.labels[0]]

    @property
    def results(self) -> list[str]:
        """The last model of each run: what the run was for."""
        return list({id(run): label for label, run in self.runs.items()}.values())

    @property
    def drawn(self) -> list[str]:
        """Models for plots with a colour each: all, of several runs the teachers and results."""
        if len(self.results) == 1:
            return self.labels
        kept = {*self.references.values(), *self.results}
        return [label for label in self.labels if label in kept]

    def short(self, label: str) -> str:
        """A label without its run."""
        return label.removeprefix(self.runs[label].at(""))

    @cached_property
    def names(self) -> list[str]:
        """Names of all figures, in the order to show them."""
        return in_order([name for some in self.figures.values() for name in some])

    def texts(self, kind: str) -> list[str]:
        """Names of the figures of a kind that is measured per text."""
        return [name for name in self.names if name.startswith(f"{kind}/")]

    def figure(self, label: str, name: str) -> Figure | None:
        """One figure of one model, if it was measured."""
        return self.figures[label].get(name)

    def value(self, label: str, name: str) -> float | None:
        """Its value; None for what is no number, such as the perplexity of a ruin."""
        found = self.figure(label, name)
        value = None if found is None else float(found["value"])
        return value if value is not None and math.isfinite(value) else None

    def stderr(self, label: str, name: str) -> float:
        """Its standard error, 0 when there is none."""
        error = float((self.figure(label, name) or {}).get("stderr", 0.0))
        return error if math.isfinite(error) else 0.0

    def ratio(self, label: str, name: str) -> float | None:
        """Its value over that of the reference; None for the reference itself."""
        reference = self.references[label]
        mine, theirs = self.value(label, name), self.value(reference, name)
        if label == reference or mine is None or not theirs:
            return None
        return mine / theirs

    def convention(self, name: str) -> str:
        """The first parts, up to a semicolon, of its convention that all models share."""
        rows = [row for label in self.labels if (row := self.figure(label, name)) is not None]
        parts = zip(*(row.get("convention", "").split("; ") for row in rows), strict=False)
        return "; ".join(same[0] for same in takewhile(lambda some: len(set(some)) == 1, parts))

    def unlike(self, name: str) -> str:
        """What differs between runs in how a figure was measured: text, teacher, convention."""
        kind, _, text = name.partition("/")
        seen: dict[str, dict[int, set[str]]] = {"text": {}, "teacher": {}, "convention": {}}

        def add(what: str, run: Run, value: str) -> None:
            seen[what].setdefault(id(run), set()).add(value)

        for label, run in self.runs.items():
            row = self.figure(label, name)
            if row is None:
                continue
            add("convention", run, row.get("convention", "").partition("; ")[0])
            key = "data" if text == "heldout" else f"text {text}"
            if read := run.measured.get(key, run.measured.get(f"task {text}", "")):
                add("text", run, read)
            if kind in ("kl", "agreement") or kind.endswith("_kept"):
                add("teacher", run, run.measured.get(f"model {run.teacher}", ""))
        return ", ".join(what for what, by_run in seen.items() if _differ(list(by_run.values())))


def _differ(some: list[set[str]]) -> bool:
    return any(one != some[0] for one in some)


def of(runs: list[Run]) -> Evaluated | None:
    """The evaluations of runs, if there is one with at least one model."""
    found = Evaluated()
    for run in runs:
        raw = run.evaluation
        if raw is None or not raw["labels"]:
            continue
        shown = {label: run.at(label) for label in raw["labels"]}
        reference = shown[raw.get("teacher") or raw["labels"][0]]
        for label, long in shown.items():
            found.labels.append(long)
            found.figures[long] = {f["name"]: f for f in raw["figures"][label]}
            found.generations[long] = raw["generations"].get(label, [])
            found.references[long], found.runs[long] = reference, run
    return found if found.labels else None
