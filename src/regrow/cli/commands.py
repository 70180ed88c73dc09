"""The commands that are not stages: run, inspect, watch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

from regrow import stage_dir
from regrow.config import Options
from regrow.errors import UserError
from regrow.recipe.recipe import KeepStages
from regrow.runtime import distributed
from regrow.stages._flags import Model, print_lines

DAY = 86_400
"""Seconds; the longest time from frame to frame of `regrow watch`."""


def run(
    recipe: Positional[str],
    out: Path,
    model: str | None = None,
    data: tuple[str, ...] = (),
    teacher: str | None = None,
    prompts: str | None = None,
    machine: OmitArgPrefixes[Options] = Options(),
    set: UseAppendAction[tuple[str, ...]] = (),
    keep_stages: KeepStages = "all",
    dry_run: bool = False,
) -> None:
    """Run a recipe: a whole job, which the same command continues after a stop.

    Args:
        recipe: YAML file with model, data and stages, or preset:NAME (docs/advise.md).
        out: Folder for stages/, metrics.jsonl, model/ and report.html.
        model: The model of a preset, or another one for a file.
        data: Sources of text for a preset, or others for a file.
        teacher: The teacher of a preset that needs one.
        prompts: The prompts of a preset that needs some.
        machine: Device, batch size, and the use of memory.
        set: Override a field of the recipe: stages.prune.keep_params=0.7.
        keep_stages: Keep the weights of all stages, or of the final model only.
        dry_run: Check everything and print what would be done.
    """
    from regrow.recipe import recipe as recipes

    given = {"MODEL": model, "DATA": data, "TEACHER": teacher, "PROMPTS": prompts}
    job = recipes.read(recipe, list(set), given)
    if not dry_run:
        recipes.run(job, out, machine, keep_stages)
    elif distributed.is_main():
        from regrow.recipe.check import describe

        if not (out / recipes.RECIPE).exists():
            stage_dir.refuse_foreign(out, "run")
        recipes.check(job, machine)
        print_lines(describe(job.model, job.data, job.steps(), machine))


def inspect(model: Model) -> None:
    """Print a model's family, its axes with their legal widths, and sizes at a few targets.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
    """
    from regrow.cli.inspect_model import describe_model

    describe_model(model)


def watch(
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")],
    once: bool = False,
    every: float = 2.0,
) -> None:
    """Show the progress of a run in the terminal, until it is complete or stopped.

    Args:
        run: Folder that regrow run writes.
        once: Print one frame and leave.
        every: Seconds from frame to frame.
    """
    from regrow.cli.watch import watch as show

    if not 0 < every <= DAY:
        raise UserError(f"--every {every}: give a number of seconds above 0, at most {DAY}")
    show(run, once, every)
