"""Renders sections to HTML; all text is escaped, plotly is embedded, nothing is downloaded.

A section is plain data. Two measures protect against text that contains markup: the template
escapes all text, and the page's content security policy allows only the scripts below, by hash, and
blocks all downloads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, ClassVar

from jinja2 import Environment
from markupsafe import Markup

import regrow


@dataclass(frozen=True)
class Cell:
    """A table cell: a value, and a remark in small print below it."""

    text: str
    small: str = ""
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; `marked` has the indices of highlighted rows."""

    kind: ClassVar[str] = "table"
    head: list[str]
    rows: list[list[Cell]]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Chart:
    """A plotly figure {data, layout} and its caption; two charts of half width share a line."""

    kind: ClassVar[str] = "chart"
    figure: dict[str, Any]
    caption: str
    height: int = 340
    half: bool = False


@dataclass(frozen=True)
class Answers:
    """One prompt and the answers of the models: (label, text)."""

    kind: ClassVar[str] = "answers"
    prompt: str
    answers: list[tuple[str, str]]


@dataclass(frozen=True)
class Details:
    """Text that is collapsed under a summary."""

    kind: ClassVar[str] = "details"
    summary: str
    text: str


Block = Table | Chart | Answers | Details


@dataclass(frozen=True)
class Section:
    """A heading, a sentence on how to read the section, and its parts."""

    key: str
    title: str
    note: str = ""
    blocks: list[Block] = field(default_factory=list)


def text(value: str) -> Cell:
    """A cell with text."""
    return Cell(value, number=False)


DRAW = """
const style = {displayModeBar: false, responsive: true};
for (const place of document.querySelectorAll(".plot")) {
  const figure = JSON.parse(document.getElementById(place.id + "-data").textContent);
  Plotly.newPlot(place, figure.data, figure.layout, style);
}
const all = (open) => document.querySelectorAll("details").forEach((d) => { d.open = open; });
addEventListener("beforeprint", () => all(true));
addEventListener("afterprint", () => all(false));
"""


def render(title: str, headline: str, sections: list[Section]) -> str:
    """Render the whole page."""
    scripts = [plotly_js(), DRAW] if any(_charts(section) for section in sections) else []
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["embedded"] = embedded
    template = environment.from_string(_resource("page.html.j2"))
    return template.render(
        title=title,
        headline=headline,
        sections=sections,
        style=Markup(_resource("style.css")),
        scripts=[Markup(script) for script in scripts],
        policy=policy(scripts),
        version=regrow.__version__,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def embedded(value: Any) -> Markup:
    """JSON that is safe inside a script element, for any strings in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def policy(scripts: list[str]) -> str:
    """Content security policy that allows only these inline scripts and blocks all downloads."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def plotly_js() -> str:
    """The plotly.js source from the plotly package."""
    from plotly.offline import get_plotlyjs

    script = str(get_plotlyjs())
    assert "</script" not in script, "plotly.js would end its own element"
    assert "\r" not in script, "browsers change line ends, and with them the hash"
    return script


def _charts(section: Section) -> list[Chart]:
    return [block for block in section.blocks if isinstance(block, Chart)]


def _resource(name: str) -> str:
    return (files("regrow.stages.report") / name).read_text(encoding="utf-8")
