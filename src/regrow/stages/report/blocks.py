"""What a section is made of: plain data, turned into escaped HTML by the page's template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Cell:
    """A table cell: a value, and a remark in small print below it."""

    text: str
    small: str = ""
    strong: bool = False
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; `marked` are the numbers of the rows to stand out."""

    kind: ClassVar[str] = "table"
    head: list[str]
    rows: list[list[Cell]]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Chart:
    """A plotly figure {data, layout} with what it shows in words; two halves share a line."""

    kind: ClassVar[str] = "chart"
    figure: dict[str, Any]
    caption: str
    height: int = 340
    half: bool = False


@dataclass(frozen=True)
class Answers:
    """One prompt and what each model wrote: (label, text)."""

    kind: ClassVar[str] = "answers"
    prompt: str
    answers: list[tuple[str, str]]


@dataclass(frozen=True)
class Details:
    """Text that is folded away under a summary."""

    kind: ClassVar[str] = "details"
    summary: str
    text: str


Block = Table | Chart | Answers | Details


@dataclass(frozen=True)
class Section:
    """A heading, a sentence on how to read it, and blocks."""

    key: str
    title: str
    note: str = ""
    blocks: list[Block] = field(default_factory=list)


def text(value: str) -> Cell:
    """A cell of words."""
    return Cell(value, number=False)
