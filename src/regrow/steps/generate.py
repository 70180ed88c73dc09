"""A generate stage of a recipe."""

from __future__ import annotations

from regrow.checkpoint import Checkpoint
from regrow.data.config import DataConfig
from regrow.data.prompts import prompts
from regrow.data.sources import at_hand, check_source
from regrow.operations import active, matmul_rate
from regrow.options import Options
from regrow.progress import clock
from regrow.stages.generate import GenerateConfig, generate
from regrow.stages.generate.stage import ask
from regrow.steps._job import Job
from regrow.steps._step import Step, prompts_of


def check(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    """Raise UserError for prompts that cannot be read."""
    asked = prompts_of(step, data)
    for source in asked.sources:
        check_source(source)
    if at_hand(asked):
        next(prompts(asked, "all", bool(checkpoint.tokenizer().chat_template)), None)


def run(job: Job, step: Step, name: str) -> None:
    """Answers of the teacher, or of the current model, for the distillations that follow."""
    assert isinstance(step.config, GenerateConfig)
    teacher = step.teacher or job.model
    model = teacher if step.by == "teacher" else job.current
    asked = prompts_of(step, job.data)
    folder = generate(model, asked, job.folder(name), step.config, job.options)
    if step.by == "teacher":
        job.answers[teacher] = folder
    else:
        job.own_answers = folder


def estimate(checkpoint: Checkpoint, data: DataConfig, config: GenerateConfig) -> list[str]:
    """Prompts, the most tokens that may come, and the time if all came at the full rate."""
    asked = ask(data, config, checkpoint, checkpoint.tokenizer())
    read, most = sum(len(ids) for _, ids in asked), len(asked) * config.max_new_tokens
    seconds = (read + most) * 2 * active(checkpoint) / matmul_rate()
    return [
        f"generate: {len(asked):,} prompts of {read:,} tokens, at most {most:,} tokens of answers",
        f"  time at best {clock(seconds)} if all are as long; small batches take many times that",
    ]
