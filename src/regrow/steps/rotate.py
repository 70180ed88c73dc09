"""A rotate stage of a recipe."""

from __future__ import annotations

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.data.config import DataConfig
from regrow.operations import active, matmul_rate
from regrow.options import Options
from regrow.progress import clock
from regrow.stages.rotate import RotateConfig, rotate
from regrow.stages.rotate.basis import check as check_rotation
from regrow.stages.rotate.basis import turned_config
from regrow.steps._job import Job
from regrow.steps._step import Step


def check(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    """Raise UserError for a family that cannot be turned."""
    check_rotation(families.of(checkpoint))


def run(job: Job, step: Step, name: str) -> None:
    """The model as it is, turned: the current one from here on."""
    assert isinstance(step.config, RotateConfig)
    rotate(job.current, job.data, job.folder(name), step.config, job.options)
    job.add("rotated", job.folder(name))


def estimate(checkpoint: Checkpoint, data: DataConfig, config: RotateConfig) -> list[str]:
    """Tokens, parameters and time of a rotation."""
    family = families.of(checkpoint)
    check_rotation(family)
    tokens = config.samples * data.sequence_length
    seconds = tokens * 2 * active(checkpoint) / matmul_rate()
    before, after = (family.count(c) for c in (checkpoint.config, turned_config(checkpoint.config)))
    return [
        f"rotate: {config.samples} blocks of {data.sequence_length} = {tokens:,} tokens, time "
        f"about {clock(seconds)}; {before:,} parameters now, then {after:,}",
    ]
