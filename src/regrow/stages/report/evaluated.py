"""Combines the evaluations of one or several runs: models by label, figures by name."""

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
    """Evaluated models in order; with several runs, a label is `run · model`."""

    labels: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    """Figures by label and name."""
    generations: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """Generations by label."""
    references: dict[str, str] = field(default_factory=dict)
    """Baseline model of the ratios by label: the teacher or first model of its evaluation."""
    runs: dict[str, Run] = field(default_factory=dict)
    """Runs by label."""

    @property
    def reference(self) -> str:
        """The baseline model of the ratios in the first run."""
        return self.references[self.labels[0]]

    @property
    def results(self) -> list[str]:
        """The last model of each run, which is its result."""
        return list({id(run): label for label, run in self.runs.items()}.values())

    @property
    def drawn(self) -> list[str]:
        """Models to plot: all models of one run, or the teachers and results of several runs."""
        if len(self.results) == 1:
            return self.labels
        kept = {*self.references.values(), *self.results}
        return [label for label in self.labels if label in kept]

    def short(self, label: str) -> str:
        """A label without the name of its run."""
        return label.removeprefix(self.runs[label].at(""))

    @cached_property
    def names(self) -> list[str]:
        """Names of all figures in display order."""
        return in_order([name for by_name in self.figures.values() for name in by_name])

    @cached_property
    def metrics(self) -> set[str]:
        """Names of the metrics of all evaluations; a figure of a task is named after its score."""
        evaluations = [run.evaluation or {} for run in self.runs.values()]
        return {name for evaluation in evaluations for name in evaluation.get("metrics", ())}

    def texts(self, kind: str) -> list[str]:
        """Names of the figures of a kind, one per text."""
        return [name for name in self.names if name.startswith(f"{kind}/")]

    def figure(self, label: str, name: str) -> Figure | None:
        """One figure of one model; None if it was not measured."""
        return self.figures[label].get(name)

    def value(self, label: str, name: str) -> float | None:
        """Value of a figure; None if it was not measured or is not finite."""
        figure = self.figure(label, name)
        value = None if figure is None else float(figure["value"])
        return value if value is not None and math.isfinite(value) else None

    def stderr(self, label: str, name: str) -> float:
        """Standard error of a figure; 0 if there is none."""
        error = float((self.figure(label, name) or {}).get("stderr", 0.0))
        return error if math.isfinite(error) else 0.0

    def ratio(self, label: str, name: str) -> float | None:
        """Value of a figure ÷ that of the baseline model; None for the baseline itself."""
        reference = self.references[label]
        value, reference_value = self.value(label, name), self.value(reference, name)
        if label == reference or value is None or not reference_value:
            return None
        return value / reference_value

    def convention(self, name: str) -> str:
        """The leading parts of a figure's convention, split at semicolons, that all share."""
        rows = [row for label in self.labels if (row := self.figure(label, name)) is not None]
        parts = zip(*(row.get("convention", "").split("; ") for row in rows), strict=False)
        return "; ".join(same[0] for same in takewhile(lambda values: len(set(values)) == 1, parts))

    def unlike(self, name: str) -> str:
        """Names of the differences between runs in a figure's text, teacher and convention."""
        kind, _, text = name.partition("/")
        values_by_run: dict[str, dict[int, set[str]]] = {
            "text": {},
            "teacher": {},
            "convention": {},
        }

        def add(aspect: str, run: Run, value: str) -> None:
            values_by_run[aspect].setdefault(id(run), set()).add(value)

        for label, run in self.runs.items():
            row = self.figure(label, name)
            if row is None:
                continue
            add("convention", run, row.get("convention", "").partition("; ")[0])
            key = "data" if text == "heldout" else f"text {text}"
            if digest := run.measured.get(key, run.measured.get(f"task {text}", "")):
                add("text", run, digest)
            if kind in ("kl", "agreement") or kind.endswith("_kept"):
                add("teacher", run, run.measured.get(f"model {run.teacher}", ""))
        return ", ".join(
            aspect for aspect, by_run in values_by_run.items() if _differ(list(by_run.values()))
        )


def _differ(values: list[set[str]]) -> bool:
    return any(other != values[0] for other in values)


def of(runs: list[Run]) -> Evaluated | None:
    """Combine the evaluations of the runs; None if no run has an evaluated model."""
    evaluated = Evaluated()
    for run in runs:
        raw = run.evaluation
        if raw is None or not raw["labels"]:
            continue
        shown = {label: run.at(label) for label in raw["labels"]}
        reference = shown[raw.get("teacher") or raw["labels"][0]]
        for label, full_label in shown.items():
            evaluated.labels.append(full_label)
            evaluated.figures[full_label] = {f["name"]: f for f in raw["figures"][label]}
            evaluated.generations[full_label] = raw["generations"].get(label, [])
            evaluated.references[full_label], evaluated.runs[full_label] = reference, run
    return evaluated if evaluated.labels else None
