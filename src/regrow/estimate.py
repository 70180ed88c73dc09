"""What `regrow run --dry-run` prints."""

from __future__ import annotations

from typing import Any

from regrow.checkpoint import load
from regrow.operations import parameters
from regrow.options import Options
from regrow.recipe import Recipe
from regrow.steps import cache, distill, fitted, profile, prune


def of_recipe(recipe: Recipe, options: Options) -> list[str]:
    """The lines of each stage, in order; sizes after a searched cut are the target's."""
    checkpoint, steps = load(recipe.model), recipe.steps()
    original = now = parameters(checkpoint)
    lines: list[str] = []
    cached: set[str | None] = set()
    for step in steps:
        config: Any = step.config
        if step.name == "profile":
            lines += profile.estimate(checkpoint, recipe.data, config)
        elif step.name == "prune":
            after = prune.parameters_after(checkpoint, config, now)
            if now == original:
                lines += prune.estimate(checkpoint, config, recipe.data.sequence_length)
            else:
                lines.append(f"prune: {now:,} parameters then; to about {after:,}")
            now = after
        elif step.name == "cache":
            teacher = load(step.teacher) if step.teacher else checkpoint
            lines += cache.estimate(teacher, recipe.data, fitted(step, steps, recipe.model))
            cached.add(step.teacher)
        elif step.name == "distill":
            names = [step.teacher or recipe.model, *config.blend]
            teachers = sum(parameters(load(name)) for name in names)
            if step.teacher in cached:
                config = config.model_copy(update={"cache": "cached by then"})
            lines += distill.training_lines(now, teachers, recipe.data, config, options)
        else:
            lines.append(f"{step.name}: of what is there by then")
    return lines
