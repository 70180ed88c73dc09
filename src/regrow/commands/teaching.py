"""What distils the original back in: generate, cache, distill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from regrow.commands._flags import Model, Text, open_model, print_lines
from regrow.options import Options
from regrow.stages.cache import CacheConfig
from regrow.stages.distill import DistillConfig
from regrow.stages.generate import GenerateConfig


def generate(
    model: Model,
    text: OmitArgPrefixes[Text],
    out: Path,
    config: OmitArgPrefixes[GenerateConfig] = GenerateConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Let a model answer prompts; its answers are text to distil on.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write answers.jsonl to; it can be given as --data.
        config: Which prompts, and how the answers are drawn.
        options: Device and portions; --batch-size prompts are answered at once.
        dry_run: Check everything and print what would be done.
    """
    from regrow.stages.generate import generate as stage
    from regrow.steps.generate import estimate

    master, blend = open_model(model, quantized=True), text.blend()
    if dry_run:
        print_lines(estimate(master, blend, config), out)
        return
    stage(master, blend, out, config, options)


def cache(
    teacher: Annotated[Positional[str], tyro.conf.arg(metavar="TEACHER")],
    text: OmitArgPrefixes[Text],
    out: Path,
    config: OmitArgPrefixes[CacheConfig] = CacheConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Run a teacher once over the text of distillations to come, and store what it says.

    Args:
        teacher: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write the cache to; a finished one is added to.
        config: How much to store, and how.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow.stages.cache import cache as stage
    from regrow.steps.cache import estimate

    master, blend = open_model(teacher), text.blend()
    if dry_run:
        print_lines(estimate(master, blend, config), out)
        return
    stage(master, blend, out, config, options)


def distill(
    student: Annotated[Positional[str], tyro.conf.arg(metavar="STUDENT")],
    teacher: str,
    text: OmitArgPrefixes[Text],
    out: Path,
    config: OmitArgPrefixes[DistillConfig] = DistillConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Train a student to give its teacher's next-token distribution.

    Args:
        student: A pruned or otherwise smaller model, or a config.json for one made fresh.
        teacher: The model to learn from; for one of another tokenizer see --cross-tokenizer.
        out: Folder to write the distilled model to.
        config: Budget, loss and schedule.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow.stages.distill import distill as stage
    from regrow.stages.distill.student import open_student
    from regrow.steps.distill import estimate

    master = open_model(teacher)
    pupil = open_student(student if student.endswith(".json") else open_model(student), master)
    blend = text.blend()
    if dry_run:
        print_lines(estimate(pupil, master, blend, config, options), out)
        return
    stage(student, master, blend, out, config, options)
