"""Evaluate: measure several models side by side and compare them with their teacher."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from regrow.config import Config, Machine
from regrow.data.config import DataConfig
from regrow.errors import UserError
from regrow.stage import BEFORE_FIRST_PRUNE, RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import (
    OptionalText,
    by_name,
    named_model,
    open_measured,
    open_model,
    print_lines,
)
from regrow.stages.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint
    from regrow.stages.evaluate.gguf_model import GgufFile


class RecipeFields(Config):
    """The field that only a recipe has."""

    compare_with: Literal["first", "before_first_prune"] = "first"
    """The model that all others are compared with: the recipe's model (first), or the one that the
    first prune began with (before_first_prune), for a teacher that the recipe trained before."""


class EvaluateStage(Stage):
    """Measures all models of the recipe so far; the report shows the results."""

    config = EvaluateConfig
    recipe_fields = RecipeFields
    takes_teacher = True
    reads = ("heldout",)
    ranks = "split"
    less_memory = "lower --batch-sizes and --prefill-tokens, or --batch-size"

    def command(
        self,
        models: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL")],
        out: Path,
        text: OmitArgPrefixes[OptionalText] = OptionalText(),
        against: str | None = None,
        measuring: OmitArgPrefixes[EvaluateConfig] = EvaluateConfig(),
        machine: OmitArgPrefixes[Machine] = Machine(),
        dry_run: bool = False,
    ) -> None:
        """Measure models side by side: perplexity, KL to the teacher, tasks, size, speed.

        Args:
            models: Model folders, or GGUF files, which llama.cpp runs; NAME=MODEL names one.
            out: Folder to write the evaluation to.
            against: The teacher, for KL and ratios; NAME=MODEL names it.
            measuring: What to measure.
            machine: Device and batch size.
            dry_run: Check all inputs and print what would be measured.
        """
        from regrow.stages.evaluate.stage import evaluate

        named = {name: open_measured(model) for name, model in by_name(models).items()}
        teacher = None
        if against is not None:
            name, place = named_model(against)
            teacher = open_model(place, quantized=True)
            if place != against and name not in named:
                named = {name: teacher, **named}
        data = text.blend() if text.data else None
        if dry_run:
            print_lines(dry_run_lines(named, teacher, data, measuring), out)
            return
        evaluate(named, out, data, teacher, measuring, machine.options())

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for missing text files or tasks, and for metrics without any input."""
        from regrow.stages.evaluate.answer_rows import check_answers
        from regrow.stages.evaluate.stage import check_metrics
        from regrow.stages.evaluate.task_rows import check_tasks
        from regrow.stages.evaluate.texts import text_files

        if _with_parent(step):
            if step.teacher is not None:
                raise UserError("teacher and compare_with before_first_prune: give one of them")
            if BEFORE_FIRST_PRUNE not in plan.left:
                raise UserError("compare_with before_first_prune: there is no prune before it")
        check_metrics(step.config, plan.data, has_teacher=True)
        for source in step.config.texts.values():
            text_files(source)
        check_tasks(step.config)
        check_answers(step.config.answers, step.config.limit)

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Measure every model so far and compare it with the teacher."""
        from regrow.stages.evaluate.stage import evaluate

        against, models = step.teacher or run.model, run.models
        if _with_parent(step):
            against = run.left[BEFORE_FIRST_PRUNE]
        if against != run.model:  # then the first model of the recipe is not the teacher
            models = {"original" if label == "teacher" else label: m for label, m in models.items()}
        evaluate(models, run.folder(folder), run.data, against, step.config, run.options)

    def inputs(self, step: Step) -> Iterable[str]:
        """Hashes of the files of the further texts and of the rows with answers."""
        from regrow.data.files import sha256_of
        from regrow.stages.evaluate.answer_rows import digest_of
        from regrow.stages.evaluate.texts import text_files

        texts, answers = step.config.texts.values(), step.config.answers.values()
        hashes = [sha256_of(path) for source in texts for path in text_files(source)]
        return hashes + [digest_of(source) for source in answers]


def _with_parent(step: Step) -> bool:
    """Whether all models are compared with the one that the first prune began with."""
    return step.extra is not None and step.extra.compare_with == "before_first_prune"


def dry_run_lines(
    models: dict[str, Checkpoint | GgufFile],
    against: Checkpoint | None,
    data: DataConfig | None,
    config: EvaluateConfig,
) -> list[str]:
    """Describe the planned measurements: metrics, model sizes, and the time to read the text.

    Raises UserError for the same input errors as `evaluate`, before any model is loaded.
    """
    from regrow.cost import forward_seconds, parameters
    from regrow.cost.units import size_text
    from regrow.llama_cpp import threads
    from regrow.runtime.progress import clock
    from regrow.stages.evaluate.answer_rows import check_answers
    from regrow.stages.evaluate.gguf_model import GgufFile
    from regrow.stages.evaluate.stage import check_metrics, check_window, load_models
    from regrow.stages.evaluate.task_rows import check_tasks
    from regrow.stages.evaluate.texts import text_files
    from regrow.stages.evaluate.tokenizer_match import open_tokenizers

    check_metrics(config, data, against is not None)
    checkpoints, teacher = load_models(models, against)
    check_window(checkpoints, config)
    for source in config.texts.values():
        text_files(source)
    tokens = len(config.texts) * config.text_tokens
    tokens += config.heldout_sequences * data.sequence_length if data is not None else 0
    lines = [f"evaluate: {', '.join(config.metrics)} on {tokens:,} tokens"]
    lines += [f"  {line}" for line in check_tasks(config)]
    lines += [f"  {line}" for line in check_answers(config.answers, config.limit)]
    open_tokenizers(checkpoints, teacher)
    for label, checkpoint in checkpoints.items():
        if isinstance(checkpoint, GgufFile):
            size = f"{checkpoint.parameters:,} parameters, {size_text(checkpoint.bytes)}"
            lines.append(f"  {label}: {size}, by llama.cpp with {threads()} threads")
            continue
        stored = sum(map(checkpoint.bytes, checkpoint.names()))
        seconds = forward_seconds(checkpoint, tokens)
        lines.append(
            f"  {label}: {parameters(checkpoint):,} parameters, {size_text(stored)}, about "
            f"{clock(seconds)} for the text; speed, tasks and generations on top"
        )
    return lines


STAGE = EvaluateStage()
