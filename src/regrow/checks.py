"""Whether the stages of a recipe can succeed where they stand, before any slow work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regrow import families, plugins
from regrow.checkpoint import Checkpoint, load
from regrow.data import Split, build_blocks
from regrow.data.config import DataConfig
from regrow.data.sources import at_hand, check_source
from regrow.errors import UserError
from regrow.options import Options
from regrow.search import blocks_for, check_keep_params, to_try
from regrow.stages.distill.across import aligner_of
from regrow.stages.distill.blend import check_blend
from regrow.stages.distill.cached import FEWER_TOKENS, check_loss
from regrow.stages.distill.teaching import hold_of
from regrow.stages.prune.config import PruneConfig
from regrow.stages.prune.stage import make_plan
from regrow.steps import STEPS, Step
from regrow.steps.prune import config_after
from regrow.training.tokens import teacher_ids


def check_steps(model: str, data: DataConfig, steps: list[Step], options: Options) -> None:
    """Raise UserError, before any slow work, for what in a job cannot succeed."""
    checkpoint = load(model)
    families.of(checkpoint)
    checkpoint.tokenizer()
    options.torch_device()
    for source in data.sources:
        check_source(source)
    _check_order(steps)
    _check_cached(steps, model, data, options)
    for step in steps:
        with _in_place(step):
            plugins.load(STEPS, step.name).check(step, checkpoint, data, options)
            if step.teacher is not None:
                _check_teacher(step, checkpoint, step.teacher, options)
    tried = _check_cuts([step for step in steps if step.name == "prune"], checkpoint)
    if at_hand(data):
        _check_text(steps, checkpoint, data, tried)


@contextmanager
def _in_place(step: Step) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{step.where}: {error}") from None


def _check_order(steps: list[Step]) -> None:
    """A prune stage needs a profile of the model that it gets; quantized weights are final."""
    profiled, quantized = False, ""
    for step in steps:
        if quantized and step.name in ("profile", "prune", "distill", "quantize"):
            raise UserError(
                f"{step.where}: comes after {quantized}, whose rounding it would undo or be undone "
                "by: distil, prune, and quantize last (distill: {fake_quantize: int4} trains for "
                f"it); to insist, set {quantized}.dequantize: true"
            )
        if step.name == "quantize" and not step.config.dequantize:
            quantized = step.where
        if step.name == "prune" and not profiled:
            raise UserError(f"{step.where}: put a profile stage of the same model before it")
        idle = ("generate", "cache", "evaluate", "export", "report")
        profiled = step.name == "profile" or (profiled and step.name in idle)


def _check_cached(steps: list[Step], model: str, data: DataConfig, options: Options) -> None:
    """What a cache cannot teach, in the distillations that will take one."""
    formats: dict[str, str] = {}
    fewer = False
    answers: set[str] = set()  # of which teachers, and "" for the student's own
    for step in steps:
        teacher = step.teacher or model
        if step.name == "cache":
            formats[teacher] = step.config.format
        elif step.name == "generate":
            answers.add(teacher if step.by == "teacher" else "")
        elif step.name == "prune":
            fewer = fewer or step.config.vocab_size is not None
        elif step.name == "distill" and (step.config.cache or teacher in formats):
            with _in_place(step):
                if fewer:
                    raise UserError(FEWER_TOKENS)
                cached = step.config.model_copy(update={"cache": "of the recipe"})
                check_blend(cached)
                hold_of(cached, options)
                if answers & {teacher, ""}:
                    raise UserError(
                        "a cache is of the data's text, and this distillation takes the answers of "
                        "a generate stage: leave out the cache"
                    )
                if step.config.cache is None:
                    check_loss(step.config, formats[teacher], data)
        if step.name in ("rotate", "prune", "distill", "quantize"):
            answers.discard("")  # of a model that is no more


def _check_teacher(step: Step, checkpoint: Checkpoint, name: str, options: Options) -> None:
    teacher = load(name)
    families.of(teacher)
    if step.name != "distill" or not aligner_of(step.config, checkpoint, teacher, options):
        teacher_ids(checkpoint, teacher)


def _check_cuts(prunes: list[Step], checkpoint: Checkpoint) -> int:
    """Follow the sizes from cut to cut, as far as they are known.

    Returns how many shapes will be tried for the first, 0 when there is no choice.
    """
    family = families.of(checkpoint)
    now: dict[str, Any] | None = checkpoint.config
    tried = 0
    for number, step in enumerate(prunes):
        config: PruneConfig = step.config
        with _in_place(step):
            if number == 0 and config.plan is not None:
                make_plan(checkpoint, config, None)
            elif number == 0:
                shapes = check_keep_params(checkpoint, config)
                tried = to_try(config, shapes)
            now = config_after(now, family, config)
    return tried


def _check_text(steps: list[Step], checkpoint: Checkpoint, data: DataConfig, tried: int) -> None:
    """Every split that is read must have a block; a choice among shapes needs more of them."""
    names = {step.name for step in steps}
    readers: dict[Split, set[str]] = {
        "heldout": {"cache", "distill", "evaluate"},
        "train": {"cache", "distill"},
        "calibration": {"quantize", "profile"},
    }
    for split, stages in readers.items():
        if names & stages:
            build_blocks(data, checkpoint.tokenizer(), split, 1)
    first = next((step for step in steps if step.name == "profile"), None)
    if first is None or not tried:
        return
    more = blocks_for(tried)
    wanted = first.config.samples + more
    found = len(build_blocks(data, checkpoint.tokenizer(), "calibration", wanted))
    if found < wanted:
        raise UserError(
            f"too little calibration text: {found} blocks, but {first.where} takes "
            f"{first.config.samples} and the choice of a shape {more} more; lower samples, or add "
            "text"
        )
