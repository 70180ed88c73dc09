"""The evaluate stage: measures models and writes their figures side by side to one JSON file."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow import plugins
from regrow.checkpoint import Checkpoint, load
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.files import sha256_of
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.runtime import distributed, vllm_server
from regrow.runtime.precision import half
from regrow.runtime.progress import say
from regrow.stage_dir import Figure, StageDir, digest, write_json
from regrow.stages.evaluate.answer_rows import check_answers, digest_of
from regrow.stages.evaluate.config import METRICS, EvaluateConfig
from regrow.stages.evaluate.contradictions import contradictions
from regrow.stages.evaluate.eval_model import (
    Context,
    EvalModel,
    MetricResult,
    ResultCache,
    TeacherOutputs,
    fit_together,
    mean_per_token,
)
from regrow.stages.evaluate.folder_model import FolderEvalModel
from regrow.stages.evaluate.gguf_model import GgufEvalModel, GgufFile, open_model
from regrow.stages.evaluate.table import show
from regrow.stages.evaluate.task_rows import Rows, find, read
from regrow.stages.evaluate.texts import Text, text_files
from regrow.stages.evaluate.tokenizer_match import (
    Models,
    open_tokenizers,
    teacher_ids_of,
    texts_of,
)

EVALUATION = "evaluation.json"
ITEMS = "items.json"
"""Scores of all items of all tasks and of all rows with answers, by model and figure."""
PARTS = "parts"
"""Folder for the results of single metrics until the evaluation is complete."""
TEACHER = "teacher"
FIRST = ("memory",)
"""Metrics that measure the loading of a model, so they run first."""


def evaluate(
    models: Mapping[str, str | Path | Checkpoint | GgufFile],
    out: str | Path,
    data: DataConfig | None = None,
    against: str | Path | Checkpoint | None = None,
    config: EvaluateConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Measure models, write `evaluation.json`, print a table, and return `out`.

    `models` maps labels to model folders or to files NAME.gguf, which llama.cpp runs. `against` is
    the teacher for KL and ratios, run by transformers. It is listed first if it is not among the
    models. An interrupted evaluation continues where it stopped. Raises UserError for a model that
    cannot be loaded, a metric without input, an unknown task, an invalid row, and other tokens.
    """
    config, options = config or EvaluateConfig(), options or Options()
    options.torch_device()
    check_metrics(config, data, against is not None)
    checkpoints, teacher = load_models(models, against)
    check_window(checkpoints, config)
    sources = find(config)
    check_answers(config.answers, config.limit)
    say(f"evaluate: {', '.join(config.metrics)} of {', '.join(checkpoints)}")
    inputs = _inputs(checkpoints, teacher, data, config)
    inputs |= {f"task {source.name}": source.digest for source in sources}
    if config.backend == "vllm":
        inputs["vllm options"] = digest(vllm_server.options())
    inputs |= {f"answers {name}": digest_of(file) for name, file in config.answers.items()}
    stage = StageDir(Path(out), "evaluate", config, inputs, resumable=True)
    if stage.complete:
        say(f"evaluate: {out} is complete and unchanged")
    else:
        tasks = [read(source) for source in sources]
        setup = _prepare(checkpoints, teacher, data, config, options, tasks)
        with stage as folder:
            results = measure_all(setup, folder / PARTS)
            if distributed.is_main():
                write_json(folder / EVALUATION, _evaluation(results, setup))
                if any(result.items for result in results.values()):
                    items = {label: result.items for label, result in results.items()}
                    (folder / ITEMS).write_text(json.dumps(items) + "\n")
                shutil.rmtree(folder / PARTS, ignore_errors=True)
            stage.figures += [
                figure.model_copy(update={"name": f"{label}/{figure.name}"})
                for label in checkpoints
                for figure in results[label].figures
            ]
    if distributed.is_main():
        show(json.loads((Path(out) / EVALUATION).read_text()))
    return Path(out)


def load_models(
    models: Mapping[str, str | Path | Checkpoint | GgufFile],
    against: str | Path | Checkpoint | None,
) -> tuple[Models, str | None]:
    """Open the checkpoints; return them by label, and the label of the teacher.

    A teacher that is not among the models comes first.
    """
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
            f"the label {TEACHER!r} is reserved for {against}, but {checkpoints[TEACHER].folder} "
            "has it: give that model another label"
        )
    return {TEACHER: teacher, **checkpoints}, TEACHER


def check_metrics(config: EvaluateConfig, data: DataConfig | None, has_teacher: bool) -> None:
    """Raise UserError for a metric that was selected by name but has no input.

    If all metrics are selected, as by default, those without input are skipped. Also raises it if
    vLLM is to run the tasks, but cannot.
    """
    if config.backend == "vllm":
        vllm_server.check()
    if set(config.metrics) == set(plugins.names(METRICS)):
        return
    for name in config.metrics:
        metric, missing = plugins.load(METRICS, name), ""
        if reads_teacher(metric) and not has_teacher:
            missing = "a teacher to compare with: give --against MODEL"
        elif hasattr(metric, "per_token") and data is None and not config.texts:
            missing = "text: give --data or --texts"
        elif name == "tasks" and not config.tasks:
            missing = "tasks: give --tasks"
        elif name == "exact_answers" and not config.answers:
            missing = "rows with answers: give --answers NAME FILE"
        elif name == "generations" and not config.prompts:
            missing = "prompts: give --prompts"
        if missing:
            raise UserError(f"metric {name} needs {missing}, or leave {name} out of metrics")


def check_window(models: Models, config: EvaluateConfig) -> None:
    """Raise UserError if the windows are longer than a model's maximum number of positions."""
    for label, model in models.items():
        limit = model.config.get("max_position_embeddings")
        if config.texts and limit is not None and config.window > limit:
            raise UserError(
                f"window {config.window} is longer than {label} supports ({limit} positions): "
                f"set it to {limit} or less"
            )


def _inputs(
    models: Models, teacher: str | None, data: DataConfig | None, config: EvaluateConfig
) -> dict[str, str]:
    inputs = {f"model {label}": model.fingerprint for label, model in models.items()}
    # Labels and their order change the output, so they are inputs.
    inputs["labels"] = json.dumps([*models, teacher])
    if data is not None:
        inputs["data"] = data_digest(data)
    for name, source in config.texts.items():
        inputs[f"text {name}"] = digest([sha256_of(path) for path in text_files(source)])
    return inputs


@dataclass(frozen=True)
class EvaluationSetup:
    """The opened and checked models, texts and tasks of an evaluation."""

    checkpoints: Models
    tokenizers: dict[str, PreTrainedTokenizerBase]
    teacher: str | None
    texts: dict[str, list[Text]]
    teacher_ids: dict[str, Tensor | None]
    """For each model, the teacher's ids of its tokens; empty if no metric reads the teacher."""
    tasks: list[Rows]
    config: EvaluateConfig
    options: Options
    metrics: dict[str, ModuleType]

    def compared(self, caches: dict[str, ResultCache]) -> list[str]:
        """Labels of the models with a pending comparison to the teacher."""
        names = [name for name in self.metrics if reads_teacher(self.metrics[name])]
        return [
            label
            for label in self.teacher_ids
            if label != self.teacher and not all(map(caches[label].has, names))
        ]

    def model(self, label: str, cache: ResultCache, keep_states: bool) -> EvalModel:
        """Return a model to measure; it is loaded on first use."""
        checkpoint = self.checkpoints[label]
        reads: Any = {
            name: metric
            for name, metric in self.metrics.items()
            if hasattr(metric, "per_token") and not cache.has(name)
        }
        tokenizer, texts = self.tokenizers[label], self.texts[label]
        if isinstance(checkpoint, GgufFile):
            gguf = GgufEvalModel(label, checkpoint, tokenizer, texts, reads)
            gguf.share_size = self.options.batch_size
            return gguf
        device, name = self.options.torch_device(), self.config.dtype
        dtype: torch.dtype = half(device) if name == "auto" else getattr(torch, name)
        return FolderEvalModel(
            *(label, checkpoint, tokenizer, texts, dtype, self.options, reads, keep_states)
        )


def _prepare(
    checkpoints: Models,
    teacher: str | None,
    data: DataConfig | None,
    config: EvaluateConfig,
    options: Options,
    tasks: list[Rows],
) -> EvaluationSetup:
    """Open tokenizers and texts of all models; raises UserError if they cannot be compared."""
    metrics = {name: load_metric(name) for name in config.metrics}
    say("evaluate: reading the tokenizers and the texts")
    tokenizers = open_tokenizers(checkpoints, teacher)
    first = teacher or next(iter(checkpoints))
    texts = texts_of(checkpoints, tokenizers, data, config, first)
    ids: dict[str, Tensor | None] = {}
    comparing = [name for name in metrics if reads_teacher(metrics[name])]
    if teacher is not None and comparing:
        ids = teacher_ids_of(checkpoints, tokenizers, teacher, texts, comparing)
    return EvaluationSetup(
        *(checkpoints, tokenizers, teacher, texts, ids, tasks, config, options, metrics)
    )


def load_metric(metric_name: str) -> ModuleType:
    """Import a metric's file; raises UserError if it defines no measurement."""
    metric = plugins.load(METRICS, metric_name)
    interfaces = [["measure"], ["measure_all"]]
    if hasattr(metric, "per_token"):
        interfaces = [["READS_TEACHER", "measure"], ["READS_TEACHER", "UNIT", "CONVENTION"]]
    if not any(all(hasattr(metric, name) for name in names) for names in interfaces):
        needs = ", or ".join(" and ".join(f"`{name}`" for name in names) for names in interfaces)
        raise UserError(
            f"metric {metric_name}: {metric.__file__} needs {needs} (docs/add-a-metric.md)"
        )
    return metric


def reads_teacher(metric: ModuleType) -> bool:
    """Whether a metric compares a model's logits with the teacher's."""
    return bool(getattr(metric, "READS_TEACHER", False))


def measure_all(setup: EvaluationSetup, folder: Path) -> dict[str, MetricResult]:
    """Return the results of all models by label, stored per metric in `folder`.

    Metrics that need all models at the same time, such as speed, run last.
    """
    results = {label: MetricResult() for label in setup.checkpoints}
    caches = {label: ResultCache(folder, n) for n, label in enumerate(setup.checkpoints)}
    models = _one_by_one(setup, caches, results)
    for name, metric in setup.metrics.items():
        if not hasattr(metric, "measure_all"):
            continue
        measured: dict[str, MetricResult] = {}

        def compute(
            label: str, metric: ModuleType = metric, measured: dict[str, MetricResult] = measured
        ) -> MetricResult:
            if not measured:
                arguments = (models, setup.config, setup.teacher)
                measured.update(distributed.on_first(partial(metric.measure_all, *arguments)))
            return measured[label]

        for label in setup.checkpoints:
            results[label].extend(caches[label].get(name, partial(compute, label)))
    return results


def _one_by_one(
    setup: EvaluationSetup, caches: dict[str, ResultCache], results: dict[str, MetricResult]
) -> dict[str, EvalModel]:
    """Measure the models one after the other, the teacher first because others need its outputs.

    Models stay loaded if a later metric needs all models and they fit in memory together.
    """
    names = [name for name in setup.metrics if not hasattr(setup.metrics[name], "measure_all")]
    names.sort(key=lambda name: name not in FIRST)
    compared = setup.compared(caches)
    models = {
        label: setup.model(label, caches[label], label == setup.teacher and compared != [])
        for label in setup.checkpoints
    }
    stay = len(names) < len(setup.metrics) and fit_together(list(models.values()))
    teachers: dict[str, TeacherOutputs] = {}
    labels = sorted(models, key=lambda label: label != setup.teacher)
    for number, label in enumerate(labels, start=1):
        model, cache = models[label], caches[label]
        model.teacher = teachers.get(label)
        of_teacher = None if setup.teacher in (None, label) else results[str(setup.teacher)]
        context = Context(setup.config, model.teacher, of_teacher, setup.tasks, cache)
        for name in names:
            if reads_teacher(setup.metrics[name]) and setup.teacher in (None, label):
                continue
            compute = _announced(
                f"evaluate {label} ({number} of {len(labels)}): {name}",
                partial(_measure, name, setup.metrics[name], model, context),
            )
            results[label].extend(cache.get(name, compute))
        if label == setup.teacher and compared:
            assert isinstance(model, FolderEvalModel), "a teacher is a folder"
            teachers = _teachers(model, setup, compared)
        if not stay:
            model.unload()
            gc.collect()
    return models


def _announced(text: str, compute: Callable[[], MetricResult]) -> Callable[[], MetricResult]:
    def announced() -> MetricResult:
        say(text)
        return compute()

    return announced


def _measure(name: str, metric: ModuleType, model: EvalModel, context: Context) -> MetricResult:
    """Call the metric's `measure` or, if it has none, average `per_token` over every text.

    The processes of a job share the texts, and what a metric with `RANKS = "split"` shares itself.
    Process 0 alone calls other metrics, such as those that measure time.
    """
    if hasattr(metric, "measure"):
        work: Callable[[], MetricResult] = partial(metric.measure, model, context)
        split = hasattr(metric, "per_token") or getattr(metric, "RANKS", "first") == "split"
        return work() if split else distributed.on_first(work)
    convention, teacher = metric.CONVENTION, context.teacher
    if metric.READS_TEACHER:
        assert teacher is not None, f"{name} has nothing to compare with"
        convention = convention.replace("{teacher}", teacher.label)
        if teacher.restricted:
            convention += f" (in the model's own tokens, {teacher.label} renormalised over them)"
    figures = []
    for text in model.texts:
        mean, stderr, tokens = mean_per_token(model, text, name)
        figures.append(
            Figure(
                name=f"{name}/{text.name}",
                value=mean,
                unit=metric.UNIT,
                n=tokens,
                stderr=stderr,
                convention=f"{convention}; {text.convention}; {model.arithmetic}",
            )
        )
    return MetricResult(figures)


def _teachers(
    model: FolderEvalModel, setup: EvaluationSetup, labels: list[str]
) -> dict[str, TeacherOutputs]:
    """Compute the teacher's outputs for each model; models with the same texts share them."""
    outputs: dict[int, TeacherOutputs] = {}
    for label in labels:
        texts = setup.texts[label]
        if id(texts) not in outputs:
            outputs[id(texts)] = model.as_teacher(texts, setup.teacher_ids[label])
    return {label: outputs[id(setup.texts[label])] for label in labels}


def _evaluation(results: dict[str, MetricResult], setup: EvaluationSetup) -> dict[str, Any]:
    figures = {
        label: [figure.model_dump(mode="json", exclude_none=True) for figure in result.figures]
        for label, result in results.items()
    }
    return {
        "labels": list(results),
        "teacher": setup.teacher,
        "metrics": list(setup.metrics),
        "figures": figures,
        "generations": {label: result.generations for label, result in results.items()},
        "notes": _notes(figures, setup),
        "warnings": contradictions(results, setup.teacher),
        "conventions": conventions(figures),
    }


def _notes(figures: dict[str, list[dict[str, Any]]], setup: EvaluationSetup) -> list[str]:
    """What a reader has to know of a model that has fewer tokens than the teacher."""
    return [
        f"the KL of {label} is over its own tokens. It does not show that a text takes more of "
        "them; bits/byte does."
        for label, rows in figures.items()
        if setup.teacher_ids.get(label) is not None
        and any(row["name"].startswith("kl/") for row in rows)
    ]


def conventions(figures: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """For each figure name, the leading parts of the convention, split at `; `, that all share."""
    by_name: dict[str, list[str]] = {}
    for rows in figures.values():
        for figure in rows:
            by_name.setdefault(figure["name"], []).append(figure["convention"])
    return {name: _shared(texts) for name, texts in by_name.items()}


def _shared(texts: list[str]) -> str:
    parts = zip(*(text.split("; ") for text in texts), strict=False)
    return "; ".join(same[0] for same in takewhile(lambda values: len(set(values)) == 1, parts))
