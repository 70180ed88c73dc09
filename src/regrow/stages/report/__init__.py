"""Report: one HTML page of a run, or of several compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from regrow.config import Config
from regrow.errors import UserError
from regrow.stage import RecipePlan, RecipeRun, Stage, Step


class ReportConfig(Config):
    """The heading of the page, and further evaluations to show; the rest follows from the run."""

    title: str = "A smaller model, and what it cost"
    """Heading of the page."""
    compare: tuple[str, ...] = ()
    """Folders of other evaluations or runs, whose models are shown beside this run's; NAME=FOLDER
    names one."""


class ReportStage(Stage):
    """Takes all that the stages before it have written; leaves report.html in the run's folder."""

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
        """Raise UserError for a page that would be empty, or has folders that are not there."""
        from regrow.stages.report.stage import check

        check(step.config)
        if plan.steps[0] is step:
            raise UserError("nothing to report on: put it after the stages that it shows")

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Report on the whole run."""
        from regrow.stages.report.stage import report

        report(run.out, run.out / "report.html", step.config)
        run.reported = True


STAGE = ReportStage()
