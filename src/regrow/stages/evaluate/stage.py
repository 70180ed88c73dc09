"""The evaluate stage: models in, one JSON file that sets them side by side out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow.checkpoint import Checkpoint, load
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.files import sha256_of
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.runtime.progress import say
from regrow.stage_dir import StageDir, digest, write_json
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.eval_model import MetricResult
from regrow.stages.evaluate.gguf_model import GgufFile, find_parents, open_model
from regrow.stages.evaluate.measuring import EvaluationSetup, measure_all
from regrow.stages.evaluate.table import show
from regrow.stages.evaluate.task_rows import find, read
from regrow.stages.evaluate.texts import text_files
from regrow.stages.evaluate.tokenizer_match import Models, teacher_ids_of, texts_of

EVALUATION = "evaluation.json"
ITEMS = "items.json"
"""The score of every item of every task, by model and figure."""
PARTS = "parts"
"""What is found, metric by metric, until all is."""
TEACHER = "teacher"


def evaluate(
    models: Mapping[str, str | Path | Checkpoint | GgufFile],
    out: str | Path,
    data: DataConfig | None = None,
    against: str | Path | Checkpoint | None = None,
    config: EvaluateConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Measure models, one loaded at a time; write `evaluation.json`, print a table, return `out`.

    `models` maps labels to folders, and to files NAME.gguf, which llama.cpp runs; `against` is the
    teacher that KL is measured from, by transformers, listed first if it is not among them. An
    interrupted evaluation goes on with the metric, and the task, where it stopped. Raises UserError
    for what cannot be loaded, for no text, for an unknown task or a row that is none, and for KL
    between models of different tokenizers.
    """
    config, options = config or EvaluateConfig(), options or Options()
    checkpoints, teacher = load_models(models, against)
    sources = find(config)
    inputs = _inputs(checkpoints, teacher, data, config)
    inputs |= {f"task {source.name}": source.digest for source in sources}
    stage = StageDir(Path(out), "evaluate", config, inputs, resumable=True)
    if stage.complete:
        say(f"evaluate: {out} is complete and unchanged")
    else:
        device = options.torch_device()
        tasks = [read(source) for source in sources]
        find_parents(checkpoints, teacher)
        _check_window(checkpoints, config)
        texts = texts_of(checkpoints, data, config, teacher or next(iter(checkpoints)))
        ids: dict[str, Tensor | None] = {}
        if teacher is not None and "kl" in config.metrics:
            ids = teacher_ids_of(checkpoints, teacher, texts)
        with stage as folder:
            parts = folder / PARTS
            found = measure_all(
                EvaluationSetup(
                    *(checkpoints, teacher, texts, ids, tasks),
                    *(config, device, options.batch_size, parts),
                )
            )
            write_json(folder / EVALUATION, _evaluation(found, teacher))
            if tasks:
                items = {label: measured.items for label, measured in found.items()}
                (folder / ITEMS).write_text(json.dumps(items) + "\n")
            shutil.rmtree(parts, ignore_errors=True)
            stage.figures += [
                figure.model_copy(update={"name": f"{label}/{figure.name}"})
                for label in checkpoints
                for figure in found[label].figures
            ]
    show(json.loads((Path(out) / EVALUATION).read_text()))
    return Path(out)


def load_models(
    models: Mapping[str, str | Path | Checkpoint | GgufFile],
    against: str | Path | Checkpoint | None,
) -> tuple[Models, str | None]:
    """Opened checkpoints by label, the teacher's first if it is not among them, and its label."""
    if not models and against is None:
        raise UserError("nothing to evaluate: name at least one model")
    checkpoints = {
        label: open_model(model) if isinstance(model, str | Path) else model
        for label, model in models.items()
    }
    if against is None:
        return checkpoints, None
    teacher = against if isinstance(against, Checkpoint) else load(against, quantized=True)
    for label, checkpoint in checkpoints.items():
        if checkpoint.folder.resolve() == teacher.folder.resolve():
            return checkpoints, label
    if TEACHER in checkpoints:
        raise UserError(
            f"label {TEACHER!r} is for {against}, but {checkpoints[TEACHER].folder} has it: "
            "give that model another label"
        )
    return {TEACHER: teacher, **checkpoints}, TEACHER


def _inputs(
    checkpoints: Models, teacher: str | None, data: DataConfig | None, config: EvaluateConfig
) -> dict[str, str]:
    inputs = {f"model {label}": model.fingerprint for label, model in checkpoints.items()}
    # Labels and their order are part of the result.
    inputs["labels"] = json.dumps([*checkpoints, teacher])
    if data is not None:
        inputs["data"] = data_digest(data)
    for name, source in config.texts.items():
        inputs[f"text {name}"] = digest([sha256_of(path) for path in text_files(source)])
    return inputs


def _check_window(checkpoints: Models, config: EvaluateConfig) -> None:
    for label, checkpoint in checkpoints.items():
        limit = checkpoint.config.get("max_position_embeddings")
        if config.texts and limit is not None and config.window > limit:
            raise UserError(
                f"window {config.window} is longer than {label} was made for ({limit} positions): "
                f"set it to {limit} or less"
            )


def _evaluation(found: dict[str, MetricResult], teacher: str | None) -> dict[str, Any]:
    figures = {
        label: [f.model_dump(mode="json", exclude_none=True) for f in measured.figures]
        for label, measured in found.items()
    }
    return {
        "labels": list(found),
        "teacher": teacher,
        "figures": figures,
        "generations": {label: measured.generations for label, measured in found.items()},
        "conventions": conventions(figures),
    }


def conventions(figures: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Per figure's name the first parts, up to a semicolon, of its convention that all share."""
    of: dict[str, list[str]] = {}
    for some in figures.values():
        for figure in some:
            of.setdefault(figure["name"], []).append(figure["convention"])
    return {name: _shared(given) for name, given in of.items()}


def _shared(given: list[str]) -> str:
    parts = zip(*(convention.split("; ") for convention in given), strict=False)
    return "; ".join(same[0] for same in takewhile(lambda some: len(set(some)) == 1, parts))
