"""Rows that a run has finished so far: one JSON line each, which survive a kill."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regrow.runtime import distributed

Row = dict[str, Any]


class Rows:
    """Files `NAME-RANK.jsonl` in a folder, one for each process; a row's `id` is its key."""

    def __init__(self, folder: Path, name: str = "done") -> None:
        self.folder, self.name = folder, name

    def read(self) -> dict[str, Row]:
        """The rows of all processes by id; incomplete lines are skipped."""
        rows: dict[str, Row] = {}
        for path in self.paths():
            with path.open(encoding="utf-8", errors="replace") as file:
                for text in file:
                    if text.endswith("\n"):
                        row = json.loads(text)
                        rows[row["id"]] = row
        return rows

    def tidy(self) -> None:
        """Write all rows to one file, so that no row is appended to an incomplete line."""
        rows, first = self.read(), self.folder / f"{self.name}-0.jsonl"
        partial = self.folder / f"{self.name}.partial"
        partial.write_text("".join(map(line, rows.values())), encoding="utf-8")
        partial.replace(first)
        for path in self.paths():
            if path != first:
                path.unlink()

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows to this process's file."""
        path = self.folder / f"{self.name}-{distributed.rank()}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(map(line, rows)))

    def remove(self) -> None:
        """Delete the files."""
        for path in self.paths():
            path.unlink()

    def paths(self) -> list[Path]:
        """The files of all processes."""
        return sorted(self.folder.glob(f"{self.name}-*.jsonl"))


def line(row: Row) -> str:
    """A row as a JSON line."""
    return json.dumps(row, ensure_ascii=False) + "\n"
