"""The report stage: a run folder in, one HTML page out that needs nothing but a browser."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from regrow.errors import UserError
from regrow.progress import say
from regrow.stages.report import run_folder
from regrow.stages.report.config import ReportConfig
from regrow.stages.report.page import render
from regrow.stages.report.sections import (
    candidates,
    conventions,
    generations,
    importance,
    kept,
    provenance,
    quality,
    result,
    training,
)

NAME = "report.html"
SECTIONS = (
    result,
    quality,
    generations,
    training,
    candidates,
    kept,
    importance,
    conventions,
    provenance,
)
"""In the order of the page."""


def report(
    run: str | Path, out: str | Path | None = None, config: ReportConfig | None = None
) -> Path:
    """Write the page of a run to `out` (default RUN/report.html) and return its path.

    Sections whose input is not there are left out. Raises UserError for a folder that holds no run
    and when plotly is not installed.
    """
    check_extra()
    folder, config = Path(run), config or ReportConfig()
    target = folder / NAME if out is None else Path(out)
    if target.is_dir():
        raise UserError(f"{target} is a folder: give --out the name of an HTML file")
    found = run_folder.read(folder)
    sections = [made for module in SECTIONS if (made := module.section(found)) is not None]
    page = render(config.title, result.headline(found), sections)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)
    say(f"report: {target} ({len(page.encode()) / 1e6:.1f} MB)")
    return target


def check_extra() -> None:
    """Raise UserError when plotly, which draws the page's charts, is not installed."""
    if find_spec("plotly") is None:
        raise UserError("the report needs plotly: pip install 'regrow[report]'")
