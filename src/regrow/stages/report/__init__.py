"""Report: one HTML page about a run, or about several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from regrow.config import Config
from regrow.errors import UserError
from regrow.stage import RecipePlan, RecipeRun, Stage, Step


class ReportConfig(Config):
    """Heading of the page, and further evaluations to show; the run supplies the other content."""

    title: str = "A smaller model, and what it cost"
    """Heading of the page."""
    compare: tuple[str, ...] = ()
    """Folders of other evaluations or runs to show next to this run; NAME=FOLDER sets the name of
    one."""


class ReportStage(Stage):
    """Reads the output of all earlier stages; writes report.html in the run's folder."""

    config = ReportConfig

    def command(
        self,
        runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")],
        out: Path | None = None,
        page: OmitArgPrefixes[ReportConfig] = ReportConfig(),
        dry_run: bool = False,
    ) -> None:
        """Write a run's one-page HTML report, or one page that compares several runs.

        Args:
            runs: Folders that regrow run wrote.
            out: HTML file to write; default RUN/report.html for a single run.
            page: What to show.
            dry_run: Print what would be written.
        """
        from regrow.stages.report.stage import report, target_of

        if dry_run:
            print(f"report: of {', '.join(map(str, runs))} to {target_of(list(runs), out)}")
            return
        print(report(runs, out, page))

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError if the page would be empty or a folder in `compare` does not exist."""
        from regrow.stages.report.stage import check

        check(step.config)
        if plan.steps[0] is step:
            raise UserError("nothing to report on: put it after the stages that it shows")

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Write the report of the whole run."""
        from regrow.stages.report.stage import report

        report(run.out, run.out / "report.html", step.config)
        run.reported = True


STAGE = ReportStage()
