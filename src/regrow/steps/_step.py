"""One stage of a recipe, read from it with its fields."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from regrow.config import Config, parse
from regrow.data.config import DataConfig
from regrow.errors import UserError, unknown

if TYPE_CHECKING:
    from regrow.stages.cache.config import CacheConfig

CONFIGS = {
    "rotate": "RotateConfig",
    "profile": "ProfileConfig",
    "prune": "PruneConfig",
    "generate": "GenerateConfig",
    "cache": "CacheConfig",
    "distill": "DistillConfig",
    "quantize": "QuantizeConfig",
    "evaluate": "EvaluateConfig",
    "export": "ExportConfig",
    "report": "ReportConfig",
}
LATER = ("advise",)
WITH_TEACHER = ("generate", "cache", "distill", "evaluate")


class Step(Config):
    """One stage of a recipe, with its fields."""

    name: str
    """The stage."""
    config: Any
    """Its config, of the class that CONFIGS names."""
    teacher: str | None = None
    """The model it learns from or is compared with; the recipe's own when None."""
    by: Literal["student", "teacher"] = "student"
    """Of generate: whose answers, those of the model as it is there or those of the teacher."""
    prompts: DataConfig | None = None
    """Of generate: what to answer, in place of the recipe's data."""
    where: str = ""
    """Its place in the recipe, for errors."""


def parse_step(entry: dict[str, Any] | str, number: int) -> Step:
    """The stage `name` or `{name: {its fields}}`; raises UserError for what is unknown."""
    entry = {entry: {}} if isinstance(entry, str) else entry
    where = f"stages.{number}"
    if len(entry) != 1:
        raise UserError(
            f"{where}: one stage per entry, as `- name: {{fields}}`; given: {list(entry)}"
        )
    ((name, fields),) = entry.items()
    if name in LATER:
        raise UserError(f"{where}: the stage {name} is not built yet; there are: {list(CONFIGS)}")
    if name not in CONFIGS:
        raise UserError(f"{where}: {unknown('stage', str(name), CONFIGS)}")
    where = f"{where}.{name}"
    if not isinstance(fields or {}, dict):
        raise UserError(f"{where}: give its fields as `key: value` (given: {fields!r})")
    fields = dict(fields or {})
    teacher = fields.pop("teacher", None) if name in WITH_TEACHER else None
    if teacher is not None and not isinstance(teacher, str):
        raise UserError(f"{where}.teacher: give a model folder or hub id (given: {teacher!r})")
    by, asked = "student", None
    if name == "generate":
        by, asked = fields.pop("by", by), fields.pop("prompts", None)
    if by not in ("student", "teacher"):
        raise UserError(f"{where}.by: must be student or teacher (given: {by!r})")
    prompts = None if asked is None else parse(DataConfig, asked, f"{where}.prompts")
    kind = getattr(import_module(f"regrow.stages.{name}"), CONFIGS[name])
    config = parse(kind, fields, where)
    return Step(name=name, config=config, teacher=teacher, by=by, prompts=prompts, where=where)


def fitted(step: Step, steps: list[Step], model: str) -> CacheConfig:
    """A cache stage's config; tokens and held-out blocks it leaves open are those that follow.

    Those of the largest distillation after it with the same teacher; `model` is the recipe's.
    """
    from regrow.stages.distill.budget import steps_in

    config: CacheConfig = step.config
    after = [
        later.config
        for later in steps[steps.index(step) + 1 :]
        if later.name == "distill" and (later.teacher or model) == (step.teacher or model)
    ]
    needs = {
        "tokens": [steps_in(each) * each.batch_tokens for each in after],
        "heldout_blocks": [each.heldout_blocks for each in after],
    }
    given = config.model_fields_set
    open_ones = {name: max(found) for name, found in needs.items() if found and name not in given}
    return config.model_copy(update=open_ones)


def prompts_of(step: Step, data: DataConfig) -> DataConfig:
    """What a generate stage answers; splits are drawn as those of the recipe's data."""
    if step.prompts is None:
        return data
    return data.model_copy(update={"sources": step.prompts.sources})
