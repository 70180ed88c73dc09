"""What was answered so far, a line per prompt, so that a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regrow import ranks

Row = dict[str, Any]


def read(folder: Path) -> dict[str, Row]:
    """The rows {id, answer, finished, tokens} of all processes, by prompt; half lines are none."""
    found: dict[str, Row] = {}
    for path in sorted(folder.glob("done-*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.endswith("\n"):
                    row = json.loads(line)
                    found[row["id"]] = row
    return found


def tidy(folder: Path) -> None:
    """Put all rows into one file, so that nothing is appended to a half line."""
    rows = read(folder)
    partial = folder / "done.partial"
    partial.write_text("".join(map(line, rows.values())), encoding="utf-8")
    partial.replace(folder / "done-0.jsonl")
    for path in folder.glob("done-*.jsonl"):
        if path.name != "done-0.jsonl":
            path.unlink()


def append(folder: Path, rows: list[Row]) -> None:
    """Add the rows of a batch to this process's file."""
    with (folder / f"done-{ranks.rank()}.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(map(line, rows)))


def line(row: Row) -> str:
    """A row as it is written."""
    return json.dumps(row, ensure_ascii=False) + "\n"
