"""Check before a run whether the stages of a recipe can succeed; describe them (--dry-run)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from regrow import families
from regrow.checkpoint import load
from regrow.config import Options
from regrow.cost import parameters
from regrow.data.config import DataConfig
from regrow.data.sequences import build_sequences
from regrow.data.sources import at_hand, check_source
from regrow.errors import UserError
from regrow.sparsity import zeros
from regrow.stage import RecipePlan, Step
from regrow.training.shared_tokens import teacher_ids
from regrow.training.text import check_length


def check_steps(model: str, data: DataConfig, steps: list[Step], options: Options) -> None:
    """Raise UserError for the first stage that cannot succeed, with its position in the recipe."""
    plan = open_plan(model, data, steps, options)
    plan.checkpoint.tokenizer()
    options.torch_device()
    for source in data.sources:
        check_source(source)
    for step in steps:
        with _in_place(step):
            _check_order(step, plan)
            step.stage.check(step, plan)
            _check_teacher(step, plan)
            leave(step, plan)
    if at_hand(data):
        _check_text(plan)


def describe(model: str, data: DataConfig, steps: list[Step], options: Options) -> list[str]:
    """Describe each stage: sizes, memory and time; targets replace sizes that are not yet known."""
    plan = open_plan(model, data, steps, options)
    lines: list[str] = []
    for step in steps:
        lines += step.stage.dry_run(step, plan)
        leave(step, plan)
    return lines


def open_plan(model: str, data: DataConfig, steps: list[Step], options: Options) -> RecipePlan:
    """Create the plan before the first stage; raises UserError for a model of an unknown family."""
    checkpoint = load(model)
    families.of(checkpoint)
    plan = RecipePlan(model, checkpoint, data, options, steps)
    plan.parameters, plan.config_now = parameters(checkpoint), checkpoint.config
    if (note := zeros.note_of(checkpoint)) is not None:
        plan.left[zeros.NOTE] = note
    return plan


def leave(step: Step, plan: RecipePlan) -> None:
    """Record the result of a stage; a changed model has no profile and no answers yet."""
    if step.stage.changes_weights:
        plan.profiled = False
        plan.answers.discard("")
    step.stage.leave(step, plan)
    plan.configs.append(plan.config_now)


@contextmanager
def _in_place(step: Step) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{step.location}: {error}") from None


def _check_order(step: Step, plan: RecipePlan) -> None:
    """Raise UserError for a stage that needs plain weights after a final quantization."""
    if plan.quantized and step.stage.needs_plain_weights:
        raise UserError(
            f"comes after {plan.quantized}, whose quantized weights are final: put quantize last "
            "(distill: {fake_quantize: int4} trains for it), or set "
            f"{plan.quantized}.dequantize: true"
        )


def _check_teacher(step: Step, plan: RecipePlan) -> None:
    """Raise UserError for a teacher of an unknown family, or with an unsuitable tokenizer."""
    if step.teacher is None:
        return
    teacher = load(step.teacher)
    families.of(teacher)
    if not step.stage.accepts_teacher(step, plan, teacher):
        teacher_ids(plan.checkpoint, teacher)


def _check_text(plan: RecipePlan) -> None:
    """Raise UserError if a split has no sequence, or too few sequences to choose a shape."""
    tokenizer = plan.checkpoint.tokenizer()
    splits = {split for step in plan.steps for split in step.stage.reads}
    if splits:
        check_length(plan.data, plan.checkpoint.config)
    for split in sorted(splits):
        build_sequences(plan.data, tokenizer, split, 1, plan.checkpoint)
    if not plan.calibration_to_choose:
        return
    wanted = plan.calibration_sequences + plan.calibration_to_choose
    alone = bool(families.mixes(plan.checkpoint.config))
    available = len(build_sequences(plan.data, tokenizer, "calibration", wanted, alone=alone))
    if available < wanted:
        profile = next(step for step in plan.steps if step.name == "profile")
        raise UserError(
            f"too little calibration text: {available} sequences, but {profile.location} takes "
            f"{plan.calibration_sequences} and the choice of a shape "
            f"{plan.calibration_to_choose} more; lower samples, or add text"
        )
