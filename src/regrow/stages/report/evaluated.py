"""An evaluation, looked up by model and figure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from regrow.stages.report.numbers import in_order
from regrow.stages.report.run_folder import Run


@dataclass(frozen=True)
class Evaluated:
    """`labels` in order; the first model is the one to compare with if there is no teacher."""

    raw: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """Models, in the order of the evaluation."""
        return list(self.raw["labels"])

    @property
    def reference(self) -> str:
        """The model that ratios are taken to."""
        return str(self.raw.get("teacher") or self.labels[0])

    @property
    def result(self) -> str:
        """The last model: what the run was for."""
        return self.labels[-1]

    @cached_property
    def names(self) -> list[str]:
        """Names of all figures, in the order to show them."""
        return in_order([f["name"] for some in self.raw["figures"].values() for f in some])

    def texts(self, kind: str) -> list[str]:
        """Names of the figures of a kind that is measured per text."""
        return [name for name in self.names if name.startswith(f"{kind}/")]

    def figure(self, label: str, name: str) -> dict[str, Any] | None:
        """One figure of one model, if it was measured."""
        return next((f for f in self.raw["figures"][label] if f["name"] == name), None)

    def value(self, label: str, name: str) -> float | None:
        """Its value."""
        found = self.figure(label, name)
        return None if found is None else float(found["value"])

    def ratio(self, label: str, name: str) -> float | None:
        """Its value over that of the reference; None for the reference itself."""
        mine, theirs = self.value(label, name), self.value(self.reference, name)
        if label == self.reference or mine is None or not theirs:
            return None
        return mine / theirs


def of(run: Run) -> Evaluated | None:
    """The run's evaluation, if it has one with at least one model."""
    raw = run.evaluation
    return Evaluated(raw) if raw is not None and raw["labels"] else None
