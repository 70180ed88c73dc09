"""All metrics on all models, one model loaded at a time; results are kept until the end.

What must be compared at the same time, such as speed, is measured on all models together.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from regrow import plugins
from regrow.stages.evaluate.config import METRICS, EvaluateConfig
from regrow.stages.evaluate.eval_model import (
    Context,
    EvalModel,
    MetricResult,
    ResultCache,
    TeacherOutputs,
)
from regrow.stages.evaluate.folder_model import FolderEvalModel
from regrow.stages.evaluate.gguf_model import GgufEvalModel, GgufFile
from regrow.stages.evaluate.task_rows import Rows
from regrow.stages.evaluate.texts import Text
from regrow.stages.evaluate.tokenizer_match import Models

FIRST = ("memory",)
"""Metrics that must see a model being loaded."""


@dataclass(frozen=True)
class EvaluationSetup:
    """What is to be measured, of whom, and where what is found is kept meanwhile."""

    checkpoints: Models
    teacher: str | None
    texts: dict[str, list[Text]]
    ids: dict[str, Tensor | None]
    """Per model the teacher's ids of its tokens; empty when there is no KL to measure."""
    tasks: list[Rows]
    config: EvaluateConfig
    device: torch.device
    batch_size: int
    folder: Path

    def subject(self, label: str, teacher: TeacherOutputs | None = None) -> EvalModel:
        """A model to measure; it is loaded when it is first needed."""
        model, texts = self.checkpoints[label], self.texts[label]
        if isinstance(model, GgufFile):
            return GgufEvalModel(label, model, texts, teacher)
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        return FolderEvalModel(label, model, texts, dtype, self.device, self.batch_size)

    def kept(self, label: str) -> ResultCache:
        """What is known of a model already."""
        return ResultCache(self.folder, list(self.checkpoints).index(label))


def measure_all(job: EvaluationSetup) -> dict[str, MetricResult]:
    """What was found of each model, in their order."""
    modules = {name: plugins.load(METRICS, name) for name in job.config.metrics}
    together = {name: m for name, m in modules.items() if "measure_all" in vars(m)}
    apart = {name: modules[name] for name in modules if name not in together}
    found = {label: MetricResult() for label in job.checkpoints}
    _one_by_one(job, apart, found)
    for name, module in together.items():
        measured: dict[str, MetricResult] = {}

        def make(label: str, module: ModuleType = module, into: dict = measured) -> MetricResult:
            if not into:
                subjects = {each: job.subject(each) for each in job.checkpoints}
                into.update(module.measure_all(subjects, job.config, job.teacher))
            return into[label]

        for label in job.checkpoints:
            found[label].extend(job.kept(label).get(name, partial(make, label)))
    return found


def _one_by_one(
    job: EvaluationSetup, modules: dict[str, ModuleType], found: dict[str, MetricResult]
) -> None:
    """The teacher first, because the others are compared with it."""
    teachers: dict[str, TeacherOutputs] = {}
    names = sorted(modules, key=lambda name: name not in FIRST)
    for label in sorted(job.checkpoints, key=lambda label: label != job.teacher):
        subject, kept = job.subject(label, teachers.get(label)), job.kept(label)
        theirs = None if job.teacher in (None, label) else found[str(job.teacher)]
        context = Context(job.config, teachers.get(label), theirs, job.tasks, kept)
        for name in names:
            make: Callable[[], MetricResult] = partial(modules[name].measure, subject, context)
            found[label].extend(kept.get(name, make))
        others = [other for other in job.ids if other != label and not job.kept(other).has("kl")]
        if label == job.teacher and others:
            assert isinstance(subject, FolderEvalModel), "a teacher is a folder"
            teachers = _teachers(subject, job, others)
        del subject, context
        gc.collect()


def _teachers(
    subject: FolderEvalModel, job: EvaluationSetup, others: list[str]
) -> dict[str, TeacherOutputs]:
    """The teacher of every other model; those of one tokenizer share it."""
    made: dict[int, TeacherOutputs] = {}
    for label in others:
        texts = job.texts[label]
        if id(texts) not in made:
            made[id(texts)] = subject.as_teacher(texts, job.ids[label])
    return {label: made[id(job.texts[label])] for label in others}
