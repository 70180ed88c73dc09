"""An evaluate stage of a recipe."""

from __future__ import annotations

from regrow.checkpoint import Checkpoint
from regrow.data.config import DataConfig
from regrow.llama_cpp import threads
from regrow.operations import active, matmul_rate, parameters
from regrow.options import Options
from regrow.progress import clock
from regrow.stages.evaluate import EvaluateConfig, evaluate
from regrow.stages.evaluate.gguf_file import GgufFile, find_parents
from regrow.stages.evaluate.task_rows import check_tasks
from regrow.stages.evaluate.texts import text_files
from regrow.steps._job import Job
from regrow.steps._step import Step


def check(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    """Raise UserError for text files and tasks that are not there."""
    for source in step.config.texts.values():
        text_files(source)
    check_tasks(step.config)


def run(job: Job, step: Step, name: str) -> None:
    """Every model so far, against the teacher."""
    assert isinstance(step.config, EvaluateConfig)
    against, models = step.teacher or job.model, job.models
    if against != job.model:  # the model that all began with is another than the teacher
        models = {"original" if label == "teacher" else label: m for label, m in models.items()}
    evaluate(models, job.folder(name), job.data, against, step.config, job.options)


def estimate(
    models: dict[str, Checkpoint | GgufFile],
    against: Checkpoint | None,
    data: DataConfig | None,
    config: EvaluateConfig,
) -> list[str]:
    """What would be measured of which models, their sizes, and the time to read the text."""
    tokens = len(config.texts) * config.text_tokens
    tokens += config.heldout_blocks * data.sequence_length if data is not None else 0
    lines = [f"evaluate: {', '.join(config.metrics)} on {tokens:,} tokens"]
    lines += [f"  {line}" for line in check_tasks(config)]
    rate = matmul_rate()
    every = {**models, **({"against": against} if against else {})}
    find_parents(every, "against")
    for label, checkpoint in every.items():
        checkpoint.tokenizer()
        if isinstance(checkpoint, GgufFile):
            what = f"{checkpoint.parameters:,} parameters, {checkpoint.bytes / 1e6:,.1f} MB"
            lines.append(f"  {label}: {what}, by llama.cpp with {threads()} threads")
            continue
        size = sum(map(checkpoint.bytes, checkpoint.names()))
        seconds = 2 * active(checkpoint) * tokens / rate
        lines.append(
            f"  {label}: {parameters(checkpoint):,} parameters, {size / 1e6:,.1f} MB, about "
            f"{clock(seconds)} for the text; speed, tasks and generations on top"
        )
    return lines
