"""A report stage of a recipe."""

from __future__ import annotations

from regrow.checkpoint import Checkpoint
from regrow.data.config import DataConfig
from regrow.options import Options
from regrow.stages.report import ReportConfig, report
from regrow.stages.report.stage import check as check_report
from regrow.steps._job import Job
from regrow.steps._step import Step


def check(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    """Raise UserError for what a page cannot show."""
    check_report(step.config)


def run(job: Job, step: Step, name: str) -> None:
    """Of the whole run."""
    assert isinstance(step.config, ReportConfig)
    report(job.out, job.out / "report.html", step.config)
    job.reported = True
