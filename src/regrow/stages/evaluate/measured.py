"""What metrics find, and keeping it while an evaluation is not finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from regrow.manifest import Figure, write_json


@dataclass(frozen=True)
class Measured:
    """What a metric found."""

    figures: list[Figure] = field(default_factory=list)
    generations: list[dict[str, str]] = field(default_factory=list)
    items: dict[str, list[float]] = field(default_factory=dict)
    """By a figure's name the scores of single items, in the order of the rows."""

    def extend(self, other: Measured) -> None:
        """Take over what another metric found."""
        self.figures.extend(other.figures)
        self.generations.extend(other.generations)
        self.items.update(other.items)


class Kept:
    """Results of one model's metrics in a folder, so that an interrupted evaluation goes on."""

    def __init__(self, folder: Path | None = None, model: int = 0) -> None:
        self.folder, self.model = folder, model

    def get(self, name: str, make: Callable[[], Measured]) -> Measured:
        """What is kept under `name`, else what `make` finds, which is kept then."""
        if self.folder is None:
            return make()
        path = self._path(self.folder, name)
        if path.exists():
            found = json.loads(path.read_text())
            figures = [Figure.model_validate(figure) for figure in found.pop("figures")]
            return Measured(figures, **found)
        made = make()
        self.folder.mkdir(exist_ok=True)
        dumped = [figure.model_dump(mode="json") for figure in made.figures]
        parts = {"generations": made.generations, "items": made.items}
        write_json(path, {"figures": dumped, **parts})
        return made

    def has(self, name: str) -> bool:
        """Whether there is a result under `name`."""
        return self.folder is not None and self._path(self.folder, name).exists()

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{self.model}-{quote(name, safe='')}.json"
