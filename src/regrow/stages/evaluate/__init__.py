"""Evaluate: measure models side by side, against their teacher."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from regrow.config import Options
from regrow.data.config import DataConfig
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import OptionalText, by_name, named_model, open_model, print_lines
from regrow.stages.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint
    from regrow.stages.evaluate.gguf_model import GgufFile


class EvaluateStage(Stage):
    """Takes all models so far; leaves their figures, for the report."""

    config = EvaluateConfig
    takes_teacher = True
    reads = ("heldout",)

    def command(
        self,
        models: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL")],
        out: Path,
        text: OmitArgPrefixes[OptionalText] = OptionalText(),
        against: str | None = None,
        measuring: OmitArgPrefixes[EvaluateConfig] = EvaluateConfig(),
        machine: OmitArgPrefixes[Options] = Options(),
        dry_run: bool = False,
    ) -> None:
        """Measure models side by side: perplexity, KL to the teacher, size, speed, generations.

        Args:
            models: Model folders, or GGUF files, which llama.cpp runs; NAME=MODEL names one.
            out: Folder to write the evaluation to.
            against: The teacher, for KL and ratios; NAME=MODEL names it.
            measuring: What to measure.
            machine: Device and batch size.
            dry_run: Check everything and print what would be done.
        """
        from regrow.stages.evaluate.stage import evaluate

        named = {name: _open(model) for name, model in by_name(models).items()}
        teacher = None
        if against is not None:
            name, place = named_model(against)
            teacher = open_model(place, quantized=True)
            if place != against and name not in named:
                named = {name: teacher, **named}
        data = text.blend() if text.data else None
        if dry_run:
            print_lines(estimate(named, teacher, data, measuring), out)
            return
        evaluate(named, out, data, teacher, measuring, machine)

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for text files and tasks that are not there."""
        from regrow.stages.evaluate.task_rows import check_tasks
        from regrow.stages.evaluate.texts import text_files

        for source in step.config.texts.values():
            text_files(source)
        check_tasks(step.config)

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Measure every model so far, against the teacher."""
        from regrow.stages.evaluate.stage import evaluate

        against, models = step.teacher or run.model, run.models
        if against != run.model:  # the model that all began with is another than the teacher
            models = {"original" if label == "teacher" else label: m for label, m in models.items()}
        evaluate(models, run.folder(folder), run.data, against, step.config, run.options)

    def inputs(self, step: Step) -> Iterable[str]:
        """Hashes of the further texts."""
        from regrow.data.files import sha256_of
        from regrow.stages.evaluate.texts import text_files

        texts = step.config.texts.values()
        return [sha256_of(path) for source in texts for path in text_files(source)]


def _open(model: str) -> Checkpoint | GgufFile:
    """A folder of a known family, or a file NAME.gguf for llama.cpp to run."""
    from regrow import families
    from regrow.stages.evaluate.gguf_model import GgufFile
    from regrow.stages.evaluate.gguf_model import open_model as open_any

    found = open_any(model)
    if not isinstance(found, GgufFile):
        families.of(found)
    return found


def estimate(
    models: dict[str, Checkpoint | GgufFile],
    against: Checkpoint | None,
    data: DataConfig | None,
    config: EvaluateConfig,
) -> list[str]:
    """What would be measured of which models, their sizes, and the time to read the text."""
    from regrow.cost import forward_seconds, parameters
    from regrow.llama_cpp import threads
    from regrow.runtime.progress import clock
    from regrow.stages.evaluate.gguf_model import GgufFile, find_parents
    from regrow.stages.evaluate.task_rows import check_tasks

    tokens = len(config.texts) * config.text_tokens
    tokens += config.heldout_sequences * data.sequence_length if data is not None else 0
    lines = [f"evaluate: {', '.join(config.metrics)} on {tokens:,} tokens"]
    lines += [f"  {line}" for line in check_tasks(config)]
    every = {**models, **({"against": against} if against else {})}
    find_parents(every, "against")
    for label, checkpoint in every.items():
        checkpoint.tokenizer()
        if isinstance(checkpoint, GgufFile):
            what = f"{checkpoint.parameters:,} parameters, {checkpoint.bytes / 1e6:,.1f} MB"
            lines.append(f"  {label}: {what}, by llama.cpp with {threads()} threads")
            continue
        size = sum(map(checkpoint.bytes, checkpoint.names()))
        seconds = forward_seconds(checkpoint, tokens)
        lines.append(
            f"  {label}: {parameters(checkpoint):,} parameters, {size / 1e6:,.1f} MB, about "
            f"{clock(seconds)} for the text; speed, tasks and generations on top"
        )
    return lines


STAGE = EvaluateStage()
