"""What `regrow run --dry-run` prints."""

from __future__ import annotations

from regrow.config import Options
from regrow.recipe.check import leave, open_plan
from regrow.recipe.recipe import Recipe


def of_recipe(recipe: Recipe, options: Options) -> list[str]:
    """The lines of each stage, in order; sizes after a searched cut are the target's."""
    plan = open_plan(recipe.model, recipe.data, recipe.steps(), options)
    lines: list[str] = []
    for step in plan.steps:
        lines += step.stage.dry_run(step, plan)
        leave(step, plan)
    return lines
