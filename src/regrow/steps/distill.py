"""A distill stage of a recipe."""

from __future__ import annotations

from regrow.checkpoint import Checkpoint
from regrow.data.config import DataConfig
from regrow.operations import matmul_rate, parameters
from regrow.options import Options
from regrow.progress import clock
from regrow.stages.distill import DistillConfig, distill
from regrow.stages.distill.answers import digests_of, text_of
from regrow.stages.distill.blend import open_blend
from regrow.stages.distill.budget import budget_of
from regrow.stages.distill.cached import check_loss
from regrow.stages.distill.mix import mix_of
from regrow.stages.distill.opposite import Opposite
from regrow.stages.distill.student import Student, check_student
from regrow.stages.distill.teaching import hold_of
from regrow.steps._job import Job
from regrow.steps._step import Step
from regrow.training.cache.folder import Cache


def check(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    """Raise UserError for losses, signals, budget, answers or cache that do not fit together."""
    budget_of(step.config, data, options)
    hold_of(step.config, options)
    check_student(Student(checkpoint), step.config, options)
    open_blend(step.config, checkpoint)
    text = text_of(data, step.config)
    mix_of(step.config, text)
    digests_of(step.config)
    if step.config.cache is not None:
        check_loss(step.config, Cache(step.config.cache).header.format, text)


def run(job: Job, step: Step, name: str) -> None:
    """By the cache and the answers that stages before it have made, unless it names its own."""
    config, teacher = step.config, step.teacher or job.model
    assert isinstance(config, DistillConfig)
    if config.cache is None and teacher in job.caches:
        config = config.model_copy(update={"cache": str(job.caches[teacher])})
    if config.answers is None and teacher in job.answers:
        config = config.model_copy(update={"answers": str(job.answers[teacher])})
    if config.own_answers is None and job.own_answers is not None:
        config = config.model_copy(update={"own_answers": str(job.own_answers)})
    distill(
        job.current,
        teacher,
        job.data,
        job.folder(name),
        config,
        job.options,
        journal=job.out / "metrics.jsonl",
    )
    job.add("distilled", job.folder(name))


def estimate(
    student: Student,
    teacher: Checkpoint,
    data: DataConfig,
    config: DistillConfig,
    options: Options,
) -> list[str]:
    """Steps, memory and time of a distillation: 2 N_teacher + 6 N_student operations per token."""
    text = text_of(data, config)
    mix_of(config, text)
    digests_of(config)
    opposite = Opposite.open(config, student, teacher, options, text)
    check_student(student, config, options)
    teachers = sum(map(parameters, opposite.checkpoints))
    return training_lines(student.parameters, teachers, data, config, options)


def training_lines(
    student: int, teacher: int, data: DataConfig, config: DistillConfig, options: Options
) -> list[str]:
    """As `estimate`, of models of so many parameters, which need not be there yet."""
    steps, micro, accumulation = budget_of(config, data, options)
    teacher = 0 if config.cache else teacher
    of_teacher = {"disk": 0, "int8": teacher}.get(hold_of(config, options), 2 * teacher)
    # Operations per token, bytes per parameter: frozen weights have no gradient and no moments.
    work, held = {"none": (6, 16.0), "lora": (4, 2.0), "qlora": (4, 0.6)}[config.adapter]
    seconds = config.tokens * (2 * teacher + work * student) / matmul_rate()
    return [
        f"distill: {steps} steps of {config.batch_tokens:,} tokens "
        f"({accumulation} micro-batches of {micro} blocks)",
        f"  memory {(held * student + of_teacher) / 1e9:.2f} GB for weights, gradients, optimizer "
        f"and teacher, activations on top; time at best {clock(seconds)}",
    ]
