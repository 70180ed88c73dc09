"""The report stage: turns run folders into one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from regrow.errors import UserError
from regrow.runtime.progress import say
from regrow.stage_dir import output_file
from regrow.stages.report import ReportConfig, run_folder
from regrow.stages.report.page import render
from regrow.stages.report.sections import (
    candidates,
    cost,
    importance,
    kept,
    provenance,
    result,
    tasks,
    tradeoff,
    training,
)

NAME = "report.html"
SECTIONS = (
    result.section,
    tradeoff.section,
    tasks.section,
    tradeoff.step_by_step,
    cost.speed,
    tasks.generations,
    training.section,
    candidates.section,
    kept.section,
    importance.section,
    result.stored,
    cost.section,
    provenance.conventions,
    provenance.section,
)
"""Sections in the order of the page."""
COMPARED = (
    result.section,
    tradeoff.section,
    tasks.section,
    cost.speed,
    tasks.generations,
    training.section,
    kept.sizes,
    result.stored,
    cost.section,
    provenance.conventions,
    provenance.section,
)
"""Sections of a page about several runs."""


def report(
    run: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    config: ReportConfig | None = None,
) -> Path:
    """Write the page about a run, or about several runs, to `out` and return its path.

    `out` defaults to RUN/report.html and is required for several runs. Sections without input are
    skipped. Raises UserError for a folder without a run, for a folder in `config.compare` without
    an evaluation, and if plotly is not installed.
    """
    config = config or ReportConfig()
    folders = [Path(run)] if isinstance(run, str | Path) else [Path(folder) for folder in run]
    target = target_of(folders, out)
    check(config)
    runs = run_folder.gather(folders, config.compare)
    makers = SECTIONS if len(folders) == 1 else COMPARED
    sections = [section for make in makers if (section := make(runs)) is not None]
    page = render(config.title, result.headline(runs), sections)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)
    say(f"report: {target} ({len(page.encode()) / 1e6:.1f} MB)")
    return target


def target_of(folders: list[Path], out: str | Path | None) -> Path:
    """The file to write; raises UserError for no run, and for several runs without `out`.

    Also raises it for a file that is no page of regrow. RUN/report.html always counts as one.
    """
    if not folders:
        raise UserError("nothing to report on: name at least one run")
    if out is None and len(folders) > 1:
        raise UserError(f"{len(folders)} runs on one page: give --out the name of an HTML file")
    own = [folder / NAME for folder in folders]
    target = own[0] if out is None else Path(out)
    return output_file(target, None if target in own else ("report", is_page))


def is_page(content: bytes) -> bool:
    """Whether the content of a file is a page of `report`; earlier versions wrote no generator."""
    marks = (b'<meta name="generator" content="regrow">', b"<footer>Made by regrow ")
    return content.startswith(b"<!DOCTYPE html>") and any(mark in content for mark in marks)


def check(config: ReportConfig) -> None:
    """Raise UserError if plotly is not installed or a folder in `compare` does not exist."""
    if find_spec("plotly") is None:
        raise UserError("the report needs plotly: pip install 'regrow[report]'")
    for _, folder in map(run_folder.split, config.compare):
        if not folder.is_dir():
            raise UserError(
                f"no such folder to compare with: {folder}; give one that regrow evaluate or "
                "regrow run wrote"
            )
