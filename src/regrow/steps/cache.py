"""A cache stage of a recipe."""

from __future__ import annotations

from regrow.checkpoint import Checkpoint, load
from regrow.data.config import DataConfig
from regrow.operations import active, matmul_rate
from regrow.options import Options
from regrow.progress import clock
from regrow.stages.cache import CacheConfig, cache
from regrow.stages.cache.stage import header_of
from regrow.steps._job import Job
from regrow.steps._step import Step, fitted


def check(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    """Raise UserError for a text, format or teacher that cannot be cached."""
    header_of(checkpoint if step.teacher is None else load(step.teacher), data, step.config)


def run(job: Job, step: Step, name: str) -> None:
    """Of a teacher, for the distillations that follow."""
    assert isinstance(step.config, CacheConfig)
    teacher, data = step.teacher or job.model, job.data
    config = fitted(step, job.steps, job.model)
    job.caches[teacher] = cache(teacher, data, job.folder(name), config, job.options)


def estimate(teacher: Checkpoint, data: DataConfig, config: CacheConfig) -> list[str]:
    """Tokens, disk and time of a cache: one pass, 2 N operations per token."""
    form = header_of(teacher, data, config).formats()["train"]
    heldout = config.heldout_blocks * data.sequence_length
    seconds = (config.tokens + heldout) * 2 * active(teacher) / matmul_rate()
    size = config.tokens * form.bytes_per_token()
    return [
        f"cache: {config.format}, {config.tokens:,} tokens to train on and {heldout:,} held out",
        f"  disk at most {size / 1e9:.2f} GB ({form.bytes_per_token():,.0f} bytes per token), time "
        f"at best {clock(seconds)}",
    ]
