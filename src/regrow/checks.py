"""Whether the stages of a recipe can succeed where they stand, before any slow work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.data.config import DataConfig
from regrow.errors import UserError
from regrow.families import Family
from regrow.options import Options
from regrow.stages.prune.config import PruneConfig
from regrow.steps import Step, prompts_of


def check_steps(model: str, data: DataConfig, steps: list[Step], options: Options) -> None:
    """Raise UserError, before any slow work, for what in a job cannot succeed."""
    from regrow.data.sources import check_source

    checkpoint = load(model)
    families.of(checkpoint)
    checkpoint.tokenizer()
    options.torch_device()
    for source in data.sources:
        check_source(source)
    _check_order(steps)
    _check_cached(steps, model, data)
    for step in steps:
        with _in_place(step):
            _check_step(step, checkpoint, data, options)
    tried = _check_cuts([step for step in steps if step.name == "prune"], checkpoint)
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


def _check_cached(steps: list[Step], model: str, data: DataConfig) -> None:
    """What a cache cannot teach, in the distillations that will take one."""
    from regrow.stages.distill.blend import check_blend
    from regrow.stages.distill.cached import FEWER_TOKENS, check_loss

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
                check_blend(step.config.model_copy(update={"cache": "of the recipe"}))
                if answers & {teacher, ""}:
                    raise UserError(
                        "a cache is of the data's text, and this distillation takes the answers of "
                        "a generate stage: leave out the cache"
                    )
                if step.config.cache is None:
                    check_loss(step.config, formats[teacher], data)
        if step.name in ("rotate", "prune", "distill", "quantize"):
            answers.discard("")  # of a model that is no more


def _check_step(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    """What a stage's own code can tell of its config, and whether its teacher can be one."""
    check = _CHECKS.get(step.name)
    if check is not None:
        check(step, checkpoint, data, options)
    if step.teacher is not None:
        _check_teacher(step, checkpoint, step.teacher, options)


def _rotate(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    from regrow.stages.rotate.basis import check

    check(families.of(checkpoint))


def _profile(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    from regrow.stages.profile.scoring import statistics_needed

    statistics_needed(step.config)


def _cache(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    from regrow.stages.cache.stage import header_of

    header_of(checkpoint if step.teacher is None else load(step.teacher), data, step.config)


def _distill(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    from regrow.stages.distill.answers import digests_of, text_of
    from regrow.stages.distill.blend import open_blend
    from regrow.stages.distill.budget import budget_of
    from regrow.stages.distill.cached import check_loss
    from regrow.stages.distill.mix import mix_of
    from regrow.stages.distill.student import Student, check_student
    from regrow.training.cache.folder import Cache

    budget_of(step.config, data, options)
    check_student(Student(checkpoint), step.config, options)
    open_blend(step.config, checkpoint)
    text = text_of(data, step.config)
    mix_of(step.config, text)
    digests_of(step.config)
    if step.config.cache is not None:
        check_loss(step.config, Cache(step.config.cache).header.format, text)


def _quantize(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    from regrow.stages.quantize.stage import check

    check(checkpoint, step.config, data)


def _evaluate(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    from regrow.stages.evaluate.task_rows import check_tasks
    from regrow.stages.evaluate.texts import text_files

    for source in step.config.texts.values():
        text_files(source)
    check_tasks(step.config)


def _export(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    from regrow.stages.export.stage import check

    check(checkpoint, step.config)


def _report(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    from regrow.stages.report.stage import check

    check(step.config)


_CHECKS: dict[str, Callable[[Step, Checkpoint, DataConfig, Options], None]] = {
    "rotate": _rotate,
    "profile": _profile,
    "cache": _cache,
    "distill": _distill,
    "quantize": _quantize,
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
}
"""Of one stage alone; prune and generate are checked with what stands around them."""


def _check_teacher(step: Step, checkpoint: Checkpoint, name: str, options: Options) -> None:
    from regrow.stages.distill.across import aligner_of
    from regrow.training.tokens import teacher_ids

    teacher = load(name)
    families.of(teacher)
    if step.name != "distill" or not aligner_of(step.config, checkpoint, teacher, options):
        teacher_ids(checkpoint, teacher)


def _check_cuts(prunes: list[Step], checkpoint: Checkpoint) -> int:
    """Follow the sizes from cut to cut, as far as they are known.

    Returns how many shapes will be tried for the first, 0 when there is no choice.
    """
    from regrow.search import check_keep_params, to_try
    from regrow.stages.prune.stage import make_plan

    family = families.of(checkpoint)
    now: dict[str, Any] | None = checkpoint.config
    tried = 0
    for number, step in enumerate(prunes):
        config: PruneConfig = step.config
        with _in_place(step):
            check_one_target(config)
            if number == 0 and config.plan is not None:
                make_plan(checkpoint, config, None)
            elif number == 0:
                shapes = check_keep_params(checkpoint, config)
                tried = to_try(config, shapes)
            now = _cut(now, family, config)
    return tried


def check_one_target(config: PruneConfig) -> None:
    """Raise UserError unless exactly one of a target to search for, sizes and plan is given."""
    given = (config.searches, bool(config.sizes()), config.plan is not None)
    if sum(given) != 1:
        what = "nothing to prune to" if not any(given) else "more than one target"
        raise UserError(f"{what}: give keep_params, or sizes such as num_layers, or a plan")


def _cut(now: dict[str, Any] | None, family: Family, config: PruneConfig) -> dict[str, Any] | None:
    """The model's config after a cut to explicit sizes; None when they are not known yet."""
    from regrow.stages.prune.choose import full_sizes

    if now is None or not config.sizes():
        return None
    before = family.sizes(now)
    after = full_sizes(family, before, config.sizes())
    families.check_sizes(family, now, after, config.multiple_of)
    sizes = {key: after[dim] for dim, key in family.config_keys.items()}
    return {**now, **sizes, "head_dim": before["head_dim"]}


def _at_hand(data: DataConfig) -> bool:
    return all(Path(source.source).expanduser().exists() for source in data.sources)


def _check_text(steps: list[Step], checkpoint: Checkpoint, data: DataConfig, tried: int) -> None:
    """Text that is at hand must fill a block of every split that is read; a search needs more."""
    from regrow.data import build_blocks
    from regrow.data.prompts import prompts
    from regrow.data.sources import check_source
    from regrow.search import blocks_for

    names = {step.name for step in steps}
    for step in (step for step in steps if step.name == "generate"):
        with _in_place(step):
            asked = prompts_of(step, data)
            for source in asked.sources:
                check_source(source)
            if _at_hand(asked):
                next(prompts(asked, "all", bool(checkpoint.tokenizer().chat_template)), None)
    if not _at_hand(data):
        return
    if names & {"cache", "distill", "evaluate"}:
        build_blocks(data, checkpoint.tokenizer(), "heldout", 1)
    if names & {"cache", "distill"}:
        build_blocks(data, checkpoint.tokenizer(), "train", 1)
    if "quantize" in names:
        build_blocks(data, checkpoint.tokenizer(), "calibration", 1)
    for step in steps:
        if step.name == "profile":
            more = blocks_for(tried) if tried else 0
            wanted = step.config.samples + more if tried else 1
            found = len(build_blocks(data, checkpoint.tokenizer(), "calibration", wanted))
            if found < wanted:
                raise UserError(
                    f"too little calibration text: {found} blocks, but {step.where} takes "
                    f"{step.config.samples} and the choice of a shape {more} more; lower "
                    "samples, or add text"
                )
            return
