"""The evaluate stage: models in, one JSON file that sets them side by side out."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow import plugins
from regrow.checkpoint import Checkpoint, load
from regrow.data import DataConfig
from regrow.data.digest import data_digest
from regrow.data.files import sha256_of
from regrow.errors import UserError
from regrow.manifest import Stage, digest, write_json
from regrow.options import Options
from regrow.progress import say
from regrow.stages.evaluate.agree import Models, teacher_ids_of, texts_of
from regrow.stages.evaluate.config import METRICS, EvaluateConfig
from regrow.stages.evaluate.subject import Context, Measured, Subject, Teacher
from regrow.stages.evaluate.table import show
from regrow.stages.evaluate.texts import Text, text_files

EVALUATION = "evaluation.json"
TEACHER = "teacher"


def evaluate(
    models: Mapping[str, str | Path | Checkpoint],
    out: str | Path,
    data: DataConfig | None = None,
    against: str | Path | Checkpoint | None = None,
    config: EvaluateConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Measure models, one loaded at a time; write `evaluation.json`, print a table, return `out`.

    `models` maps labels to folders; `against` is the teacher that KL is measured from, listed
    first if it is not among them. Raises UserError for what cannot be loaded, for no text, and for
    KL between models of different tokenizers.
    """
    config, options = config or EvaluateConfig(), options or Options()
    checkpoints, teacher = line_up(models, against)
    stage = Stage(Path(out), "evaluate", config, _inputs(checkpoints, teacher, data, config))
    if stage.complete:
        say(f"evaluate: {out} is complete and unchanged")
    else:
        device = options.torch_device()
        _check_window(checkpoints, config)
        texts = texts_of(checkpoints, data, config, teacher or next(iter(checkpoints)))
        ids: dict[str, Tensor | None] = {}
        if teacher is not None and "kl" in config.metrics:
            ids = teacher_ids_of(checkpoints, teacher, texts)
        with stage as folder:
            found: dict[str, Measured] = {}
            for label, measured in _measure_all(
                checkpoints, teacher, texts, ids, config, device, options.batch_size
            ):
                found[label] = measured
            evaluation = _evaluation({label: found[label] for label in checkpoints}, teacher)
            write_json(folder / EVALUATION, evaluation)
            stage.figures += [
                figure.model_copy(update={"name": f"{label}/{figure.name}"})
                for label in checkpoints
                for figure in found[label].figures
            ]
    show(json.loads((Path(out) / EVALUATION).read_text()))
    return Path(out)


def line_up(
    models: Mapping[str, str | Path | Checkpoint], against: str | Path | Checkpoint | None
) -> tuple[Models, str | None]:
    """Opened checkpoints by label, the teacher's first if it is not among them, and its label."""
    if not models and against is None:
        raise UserError("nothing to evaluate: name at least one model")
    checkpoints = {label: _open(model) for label, model in models.items()}
    if against is None:
        return checkpoints, None
    teacher = _open(against)
    for label, checkpoint in checkpoints.items():
        if checkpoint.folder.resolve() == teacher.folder.resolve():
            return checkpoints, label
    if TEACHER in checkpoints:
        raise UserError(
            f"label {TEACHER!r} is for {against}, but {checkpoints[TEACHER].folder} has it: "
            "give that model another label"
        )
    return {TEACHER: teacher, **checkpoints}, TEACHER


def _open(model: str | Path | Checkpoint) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else load(model, quantized=True)


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


def _measure_all(
    checkpoints: Models,
    teacher: str | None,
    texts: dict[str, list[Text]],
    ids: dict[str, Tensor | None],
    config: EvaluateConfig,
    device: torch.device,
    batch_size: int,
) -> Any:
    """Yields (label, Measured), the teacher first, because the others are compared with it."""
    teachers: dict[str, Teacher] = {}
    dtype: torch.dtype = getattr(torch, config.dtype)
    for label in sorted(checkpoints, key=lambda label: label != teacher):
        subject = Subject(label, checkpoints[label], texts[label], dtype, device, batch_size)
        yield label, _measure(subject, Context(config, teachers.get(label)))
        if label == teacher and "kl" in config.metrics:
            teachers = _teachers(subject, texts, ids)
        del subject
        gc.collect()


def _teachers(
    subject: Subject, texts: dict[str, list[Text]], ids: dict[str, Tensor | None]
) -> dict[str, Teacher]:
    """The teacher of every other model; those of one tokenizer share it."""
    made: dict[int, Teacher] = {}
    for label, ids_V in ids.items():
        if label != subject.label and id(texts[label]) not in made:
            made[id(texts[label])] = Teacher.of(subject, texts[label], ids_V)
    return {label: made[id(texts[label])] for label in ids if label != subject.label}


def _measure(subject: Subject, context: Context) -> Measured:
    every = Measured()
    for name in context.config.metrics:
        measured: Measured = plugins.load(METRICS, name).measure(subject, context)
        every.figures.extend(measured.figures)
        every.generations.extend(measured.generations)
    return every


def _evaluation(found: dict[str, Measured], teacher: str | None) -> dict[str, Any]:
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
