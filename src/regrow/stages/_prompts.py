"""The prompts of a step of a recipe, for the stages in which a model answers some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from regrow.config import Config
from regrow.data.config import DataConfig, Split
from regrow.stage import RecipePlan, Step


class PromptFields(Config):
    """The field that only a recipe has: the prompts."""

    prompts: DataConfig | None = None
    """The prompts to answer, instead of the recipe's data."""


def prompts_of(step: Step, data: DataConfig) -> DataConfig:
    """The prompts that a step answers, split by the same rules as the recipe's data."""
    if step.extra.prompts is None:
        return data
    return data.model_copy(update={"sources": step.extra.prompts.sources})


def check_prompts(step: Step, plan: RecipePlan, split: Split | Literal["all"]) -> None:
    """Raise UserError for missing sources, and for a first row without a prompt."""
    from regrow.data.prompts import prompts
    from regrow.data.sources import at_hand, check_source

    data = prompts_of(step, plan.data)
    for source in data.sources:
        check_source(source)
    if at_hand(data):
        template = step.config.chat_template and plan.checkpoint.tokenizer().chat_template
        next(prompts(data, split, bool(template)), None)


def prompt_digests(step: Step) -> Iterable[str]:
    """The hash of the step's own prompts, if it has some."""
    from regrow.data.sources import data_digest

    return () if step.extra.prompts is None else (data_digest(step.extra.prompts),)
