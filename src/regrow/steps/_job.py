"""What a recipe carries from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from regrow.data.config import DataConfig
from regrow.options import Options
from regrow.steps._step import Step


@dataclass
class Job:
    """A recipe at work: what it is given, and what its stages have made so far."""

    model: str
    """The recipe's: the teacher, where a stage names no other."""
    data: DataConfig
    steps: list[Step]
    out: Path
    options: Options
    current: str | Path = ""
    """The model that the next stage works on."""
    plain: str | Path = ""
    """The current model before it was quantized: what a file of other types is made from."""
    profile: Path | None = None
    caches: dict[str, Path] = field(default_factory=dict)
    """By teacher, the last cache of it."""
    answers: dict[str, Path] = field(default_factory=dict)
    """By teacher, its last answers."""
    own_answers: Path | None = None
    """Those of the current model."""
    models: dict[str, str | Path] = field(default_factory=dict)
    """By label, all that an evaluation measures."""
    reported: bool = False

    def __post_init__(self) -> None:
        self.current = self.plain = self.model
        self.models = {"teacher": self.model}

    def folder(self, name: str) -> Path:
        """A stage's output folder."""
        return self.out / "stages" / name

    def add(self, label: str, folder: Path) -> None:
        """Make `folder` the current model, to be evaluated under `label`."""
        count = sum(known.split(" ")[0] == label for known in self.models)
        self.models[f"{label} {count + 1}" if count else label] = folder
        self.current = self.plain = folder
        self.own_answers = None
