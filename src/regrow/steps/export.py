"""An export stage of a recipe."""

from __future__ import annotations

from regrow.checkpoint import Checkpoint
from regrow.data.config import DataConfig
from regrow.options import Options
from regrow.stages.export import ExportConfig, export
from regrow.stages.export.stage import check as check_export
from regrow.steps._job import Job
from regrow.steps._step import Step


def check(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    """Raise UserError for a type or an architecture that llama.cpp cannot hold."""
    check_export(checkpoint, step.config)


def run(job: Job, step: Step, name: str) -> None:
    """Of the model before it was quantized."""
    assert isinstance(step.config, ExportConfig)
    export(job.plain, job.folder(name), step.config, job.data)
