"""Whole jobs: run one, look at a model, report on runs and watch them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

from regrow.commands._flags import Model, print_lines
from regrow.errors import UserError
from regrow.options import Options
from regrow.recipe import KeepStages
from regrow.stages.report import ReportConfig


def run(
    recipe: Positional[Path],
    out: Path,
    options: OmitArgPrefixes[Options] = Options(),
    set: UseAppendAction[tuple[str, ...]] = (),
    keep_stages: KeepStages = "all",
    dry_run: bool = False,
) -> None:
    """Run a recipe: a whole job, resumable by the same command.

    Args:
        recipe: YAML file with model, data and stages.
        out: Folder for stages/, metrics.jsonl, model/ and report.html.
        options: Device and portions.
        set: Override a field of the recipe: stages.prune.keep_params=0.7.
        keep_stages: Keep the weights of all stages, or of the final model only.
        dry_run: Check everything and print what would be done.
    """
    from regrow import estimate
    from regrow import recipe as recipes

    job = recipes.read(recipe, list(set))
    if dry_run:
        recipes.check(job, options)
        print_lines(estimate.of_recipe(job, options))
        return
    recipes.run(job, out, options, keep_stages)


def inspect(model: Model) -> None:
    """Print a model's family, its axes with their legal widths, and sizes at a few targets.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
    """
    from regrow.inspect import describe_model

    describe_model(model)


def report(
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")],
    out: Path | None = None,
    config: OmitArgPrefixes[ReportConfig] = ReportConfig(),
    dry_run: bool = False,
) -> None:
    """Write a run's one-page HTML report, or one of several runs compared.

    Args:
        runs: Folders that regrow run wrote.
        out: HTML file to write; default RUN/report.html for a single run.
        config: What to show.
        dry_run: Print what would be written.
    """
    from regrow.stages.report import report as stage
    from regrow.stages.report.stage import target_of

    if dry_run:
        print(f"report: of {', '.join(map(str, runs))} to {target_of(list(runs), out)}")
        return
    print(stage(runs, out, config))


def watch(
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")],
    once: bool = False,
    every: float = 2.0,
) -> None:
    """Show a run that goes on, or is done, in the terminal, until it is complete.

    Args:
        run: Folder that regrow run writes.
        once: Print one frame and leave.
        every: Seconds from frame to frame.
    """
    from regrow.watch import watch as live

    if every <= 0:
        raise UserError(f"--every {every}: give a number of seconds above 0")
    live(run, once, every)
