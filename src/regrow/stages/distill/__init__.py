"""Distill: train a student towards its teacher's next-token distribution."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from regrow.config import Config, Options
from regrow.data.config import DataConfig
from regrow.errors import UserError
from regrow.stage import BEFORE_FIRST_PRUNE, BEFORE_PRUNE, RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Text, open_model, print_lines
from regrow.stages.distill.config import DistillConfig

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint
    from regrow.stages.distill.student import Student


class RecipeFields(Config):
    """The field that only a recipe has."""

    learn_from: Literal["first", "before_prune", "before_first_prune"] = "first"
    """The teacher: the recipe's model (first); the model that the last prune began with
    (before_prune), for a chain of shrinking teachers; or the one that the first prune began with
    (before_first_prune), for a teacher that the recipe trained before."""


class DistillStage(Stage):
    """Trains the current model; uses a cache and answers from earlier stages, if there are any."""

    config = DistillConfig
    recipe_fields = RecipeFields
    takes_teacher = True
    ranks = "split"
    changes_weights = True
    needs_plain_weights = True
    reads = ("validation", "train")

    def command(
        self,
        student: Annotated[Positional[str], tyro.conf.arg(metavar="STUDENT")],
        teacher: str,
        text: OmitArgPrefixes[Text],
        out: Path,
        training: OmitArgPrefixes[DistillConfig] = DistillConfig(),
        machine: OmitArgPrefixes[Options] = Options(),
        dry_run: bool = False,
    ) -> None:
        """Train a student towards its teacher's next-token distribution.

        Args:
            student: A pruned or otherwise smaller model, or a config.json for random weights.
            teacher: The model to learn from; --cross-tokenizer allows another tokenizer.
            out: Folder to write the distilled model to.
            training: Budget, losses and schedule.
            machine: Device, batch size, and memory options.
            dry_run: Check everything and print steps, memory and time instead of training.
        """
        checkpoint, data = open_model(teacher), text.blend()
        source = student if student.endswith(".json") else open_model(student)
        from regrow.stages.distill.stage import distill
        from regrow.stages.distill.student import open_student

        opened = open_student(source, checkpoint)
        if dry_run:
            print_lines(estimate(opened, checkpoint, data, training, machine), out)
            return
        distill(student, checkpoint, data, out, training, machine)

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError if losses, budget, answers and cache are not compatible."""
        from regrow.sparsity.zeros import NOTE
        from regrow.stages.distill.domains import check_domains
        from regrow.stages.distill.on_policy import check_on_policy
        from regrow.stages.distill.setup import budget_of
        from regrow.stages.distill.student import Student, check_keeps_zeros, check_student
        from regrow.stages.distill.teacher import check_loss, open_extra_teachers, teacher_placement
        from regrow.stages.distill.text import answer_digests, loss_weights_of, training_text
        from regrow.training.cache.folder import Cache

        config, options = step.config, plan.options
        check_domains(config, plan.data, options)
        if parent := _learns_from_parent(step):
            if step.teacher is not None:
                raise UserError(f"teacher and learn_from {step.extra.learn_from}: give one of them")
            if parent not in plan.left:
                raise UserError(
                    f"learn_from {step.extra.learn_from}: there is no prune stage before it"
                )
        check_on_policy(config, plan.data, options)
        budget_of(config, plan.data, options)
        teacher_placement(config, options)
        check_student(Student(plan.checkpoint), config, options)
        if NOTE in plan.left and config.keep_zeros:
            check_keeps_zeros(plan.left[NOTE], config, options)
        open_extra_teachers(config, plan.checkpoint)
        text = training_text(plan.data, config)
        _check_targets(step, plan)
        loss_weights_of(config, text)
        answer_digests(config)
        if config.cache is not None:
            check_loss(config, Cache(config.cache).header.format, text)
        cached = (step.teacher or plan.model) in plan.caches and not _learns_from_parent(step)
        if config.cache or cached:
            _check_cached(step, plan)

    def accepts_teacher(self, step: Step, plan: RecipePlan, teacher: Checkpoint) -> bool:
        """Whether the teacher may have another tokenizer, which a cross-tokenizer loss allows."""
        from regrow.stages.distill.teacher import aligner_of

        return bool(aligner_of(step.config, plan.checkpoint, teacher, plan.options))

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """The estimated steps, memory and time."""
        from regrow.checkpoint import load
        from regrow.cost import parameters
        from regrow.stages.distill.preflight import memory_lines

        config = step.config
        names = [step.teacher or plan.model, *config.extra_teachers]
        teachers = [load(name) for name in names]
        if (step.teacher or plan.model) in plan.caches and not _learns_from_parent(step):
            config = config.model_copy(update={"cache": "cached by then"})
        count = sum(map(parameters, teachers))
        lines = training_lines(plan.parameters, count, plan.data, config, plan.options)
        configs = [each.config for each in teachers]
        # Where the shape is searched for, the model before the cut is an upper bound.
        student, searched = plan.config_now or plan.checkpoint.config, plan.config_now is None
        return lines + memory_lines(student, configs, config, plan.data, plan.options, searched)

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """Note that a sparse student is dense again, where its zeros are not kept."""
        from regrow.sparsity.zeros import NOTE

        if not step.config.keep_zeros:
            plan.left.pop(NOTE, None)

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Distil with the cache and answers of earlier stages, unless the config names others."""
        from regrow.stages.distill.stage import distill

        config, teacher = step.config, step.teacher or run.model
        if parent := _learns_from_parent(step):
            teacher = run.left[parent]
        if config.cache is None and teacher in run.caches:
            config = config.model_copy(update={"cache": str(run.caches[teacher])})
        if config.answers is None and teacher in run.answers:
            config = config.model_copy(update={"answers": str(run.answers[teacher])})
        if config.own_answers is None and run.own_answers is not None:
            config = config.model_copy(update={"own_answers": str(run.own_answers)})
        out, metrics = run.folder(folder), run.out / "metrics.jsonl"
        distill(run.current, teacher, run.data, out, config, run.options, metrics)
        run.add("distilled", run.folder(folder))

    def needs_of_cache(self, step: Step) -> dict[str, int]:
        """The numbers of tokens and of validation sequences that this stage reads from a cache."""
        from regrow.stages.distill.setup import steps_in

        config = step.config
        tokens = steps_in(config) * config.batch_tokens
        return {"tokens": tokens, "heldout_sequences": config.heldout_sequences}

    def inputs(self, step: Step) -> Iterable[str]:
        """Hashes of the extra teachers and of the student's prompts."""
        from regrow.checkpoint import load
        from regrow.stages.distill.text import answer_digests

        prompts = answer_digests(step.config).get("on_policy_prompts")
        teachers = [load(name).fingerprint for name in sorted(step.config.extra_teachers)]
        return teachers if prompts is None else [*teachers, prompts]


def _learns_from_parent(step: Step) -> str | None:
    """The note of the model before a prune that is the teacher; None if the teacher is another."""
    notes = {"before_prune": BEFORE_PRUNE, "before_first_prune": BEFORE_FIRST_PRUNE}
    return None if step.extra is None else notes.get(step.extra.learn_from)


def _check_targets(step: Step, plan: RecipePlan) -> None:
    """Raise UserError unless the answers of an earlier stage have the log-probabilities asked for.

    Answers that the config names are looked at too.
    """
    from regrow.stages.distill.teacher import check_targets
    from regrow.training.answer_targets import TOP_LOGPROBS, check_logprobs

    config = step.config
    if config.answer_targets == "teacher":
        return
    if config.answers is not None:
        check_logprobs(Path(config.answers))
    elif (step.teacher or plan.model) in plan.answers:
        config = config.model_copy(update={"answers": "of the recipe"})
        if TOP_LOGPROBS not in plan.left:
            raise UserError(
                f"answer_targets {config.answer_targets}: the generate stage before it stores no "
                "log-probabilities: give it top_logprobs: 20"
            )
    check_targets(config, plan.data)


def _check_cached(step: Step, plan: RecipePlan) -> None:
    """Raise UserError for fields that a cache does not support."""
    from regrow.stages.distill.domains import check_domains
    from regrow.stages.distill.on_policy import check_on_policy
    from regrow.stages.distill.teacher import (
        FEWER_TOKENS,
        check_extra_teachers,
        check_loss,
        teacher_placement,
    )

    teacher = step.teacher or plan.model
    if plan.fewer_tokens:
        raise UserError(FEWER_TOKENS)
    cached = step.config.model_copy(update={"cache": "of the recipe"})
    check_domains(cached, plan.data, plan.options)
    check_on_policy(cached, plan.data, plan.options)
    check_extra_teachers(cached)
    teacher_placement(cached, plan.options)
    if plan.answers & {teacher, ""}:
        raise UserError(
            "a cache is of the data's text, and this distillation trains on answers of a generate "
            "stage: leave out the cache"
        )
    if step.config.cache is None:
        check_loss(step.config, plan.caches[teacher], plan.data)


def estimate(
    student: Student,
    teacher: Checkpoint,
    data: DataConfig,
    config: DistillConfig,
    options: Options,
) -> list[str]:
    """The estimated steps, time and memory: 2 N_teacher + 6 N_student operations per token."""
    from regrow.cost import parameters
    from regrow.stages.distill.domains import check_domains
    from regrow.stages.distill.on_policy import check_on_policy
    from regrow.stages.distill.preflight import memory_lines
    from regrow.stages.distill.setup import DistillSetup
    from regrow.stages.distill.teacher import TeacherSetup
    from regrow.stages.distill.text import answer_digests, training_text

    check_on_policy(config, data, options)
    check_domains(config, data, options)
    answer_digests(config)
    text = training_text(data, config)
    teachers = TeacherSetup.open(config, student, teacher, options, text)
    DistillSetup.of(student, teachers, data, config, options)
    count = sum(map(parameters, teachers.checkpoints))
    lines = training_lines(student.parameters, count, data, config, options)
    configs = [each.config for each in teachers.checkpoints]
    return lines + memory_lines(student.fields, configs, config, data, options)


def training_lines(
    student: int, teacher: int, data: DataConfig, config: DistillConfig, options: Options
) -> list[str]:
    """Steps and time of `estimate`, from parameter counts; the models need not exist yet."""
    from regrow.cost import seconds_for, training_operations
    from regrow.cost.steps import usual_batch
    from regrow.runtime.progress import clock
    from regrow.stages.distill.setup import budget_of

    steps, micro, accumulation = budget_of(config, data, options)
    teacher = 0 if config.cache else teacher
    seconds = seconds_for(config.tokens, training_operations(student, teacher, config.adapter))
    own = f", {config.on_policy_share:.0%} written by the student" if config.on_policy_share else ""
    lines = [
        f"distill: {steps} steps of {config.batch_tokens:,} tokens{own} "
        f"({accumulation} micro-batches of {micro} sequences)",
        f"  time at best {clock(seconds)}",
    ]
    usual = usual_batch(config.tokens)
    if options.torch_device().type == "cuda" and config.batch_tokens < usual:
        lines.append(
            f"  a GPU is mostly idle in such short steps: --batch-tokens {usual} is usual for "
            f"{config.tokens:,} tokens, at the same learning rate"
        )
    return lines


STAGE = DistillStage()
