"""A model under evaluation, the stored outputs of the teacher, and the result of a metric.

Shapes: N scored tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol
from urllib.parse import quote

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.runtime.progress import Progress, progress
from regrow.stage_dir import Figure, write_json
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.task_rows import Rows
from regrow.stages.evaluate.texts import Text
from regrow.training.head import Head

MEMORY_SHARE = 0.5
"""Models stay loaded together if they need at most this share of the free memory."""


@dataclass(frozen=True)
class MetricResult:
    """Figures, generations and per-item scores of one metric on one model."""

    figures: list[Figure] = field(default_factory=list)
    generations: list[dict[str, str]] = field(default_factory=list)
    items: dict[str, list[float]] = field(default_factory=dict)
    """Scores of the single items by figure name, in the order of the rows."""

    def extend(self, other: MetricResult) -> None:
        """Add the results of another metric."""
        self.figures.extend(other.figures)
        self.generations.extend(other.generations)
        self.items.update(other.items)


class ResultCache:
    """Results of one model's metrics, stored in a folder to resume an interrupted evaluation."""

    def __init__(self, folder: Path | None = None, model: int = 0) -> None:
        self.folder, self.model = folder, model

    def get(self, name: str, compute: Callable[[], MetricResult]) -> MetricResult:
        """Return the stored result of `name`, or call `compute()` and store its result.

        In a job of several processes all of them call this, or all compute.
        """
        if self.folder is None:
            return compute()
        path = self._path(self.folder, name)
        text = distributed.from_first(lambda: path.read_text() if path.exists() else None)
        if text is not None:
            stored = json.loads(text)
            figures = [Figure.model_validate(figure) for figure in stored.pop("figures")]
            return MetricResult(figures, **stored)
        result = compute()
        if not distributed.is_main():
            return result
        self.folder.mkdir(exist_ok=True)
        figures_json = [figure.model_dump(mode="json") for figure in result.figures]
        rest = {"generations": result.generations, "items": result.items}
        write_json(path, {"figures": figures_json, **rest})
        return result

    def has(self, name: str) -> bool:
        """Whether a result is stored under `name`."""
        return self.folder is not None and self._path(self.folder, name).exists()

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{self.model}-{quote(name, safe='')}.json"


class LogitMetric(Protocol):
    """A metric file that reads logits; see docs/add-a-metric.md."""

    READS_TEACHER: bool
    """Whether it compares with the teacher's logits; the teacher itself then gets no figures."""

    @staticmethod
    def per_token(logits_NV: Tensor, teacher_NV: Tensor | None, targets_N: Tensor) -> Tensor:
        """Return one value [N] per scored token; must not change the logits."""


@dataclass(frozen=True)
class Window:
    """Final hidden states [N, H] at the scored positions of a window, and the target tokens [N]."""

    states_NH: Tensor
    targets_N: Tensor


@dataclass(frozen=True)
class TeacherOutputs:
    """Outputs that stay available after the teacher is unloaded: its head and its hidden states."""

    label: str
    head: Head
    vocab_size: int
    """Number of token ids; the head's rows after these are padding of the embedding."""
    windows: dict[str, dict[int, Window]]
    """Windows of this process by text and number."""
    restricted: bool = False
    """Whether it was run on the other model's tokens, with only their rows in its head."""

    def logits(self, text: str, window: int, part: slice, device: torch.device) -> Tensor:
        """Return logits [N, vocab_size] on `device`, at the scored positions `part` of a window."""
        weight_VH = self.head.weight_VH
        states_NH = self.windows[text][window].states_NH[part].to(weight_VH.device)
        logits_NV = self.head.logits(states_NH, weight_VH, exact=True)
        return logits_NV[:, : self.vocab_size].to(device)


@dataclass
class TextSums:
    """Number of scored tokens in each window of a text, and each metric's sum per window."""

    counts: list[int]
    sums: dict[str, list[float]]


class EvalModel(ABC):
    """A model and its texts: a folder run by transformers, or a GGUF file run by llama.cpp.

    The model is loaded on first use.
    """

    device: torch.device
    batch_size: int
    source: Path
    """Model folder or GGUF file."""
    arithmetic: str
    """Data type of the computation, or the program that runs the model."""
    engine: ClassVar[str]
    """The program that runs the model; speeds are only comparable within one program."""
    next_tokens: ClassVar[str]
    """Which tokens the timed decoding reads: `greedy` or `random`."""

    def __init__(
        self,
        label: str,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[Text],
        logit_metrics: Mapping[str, LogitMetric],
    ) -> None:
        self.label, self.tokenizer, self.texts = label, tokenizer, texts
        self.logit_metrics = logit_metrics
        """The metrics that are computed in one pass over a text, by name."""
        self.teacher: TeacherOutputs | None = None
        """Outputs of the teacher; without them, metrics that read the teacher are skipped."""
        self.share_size = 1
        """Consecutive windows that the same process of a job reads; equal for all models."""
        self._sums: dict[str, TextSums] = {}

    def has_window(self, number: int) -> bool:
        """Whether this process of a job reads that window of a text."""
        return number // self.share_size % distributed.world_size() == distributed.rank()

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return "model" in vars(self)

    @property
    @abstractmethod
    def hardware(self) -> str:
        """Device or program, and the number of threads."""

    @property
    @abstractmethod
    def bytes_to_load(self) -> float:
        """Approximate memory of the loaded model, in bytes."""

    @abstractmethod
    def load(self) -> None:
        """Load the model if it is not loaded yet."""

    @abstractmethod
    def unload(self) -> None:
        """Free the memory of the model; it is loaded again on the next use."""

    @abstractmethod
    def logits(self, text: Text, counter: Progress) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (number, logits [N, V], targets [N]) of the windows of this process of a job.

        Only scored positions are included. A window may come in several chunks, and the logits are
        at least float32.
        """

    @abstractmethod
    def continuation(self, ids: list[int], new_tokens: int) -> list[int]:
        """Return at most `new_tokens` greedy tokens after `ids`, without the end token."""

    def continuations(
        self, prompts: Sequence[list[int]], new_tokens: int, counter: Progress
    ) -> list[list[int]]:
        """Return at most `new_tokens` greedy tokens after each prompt, without the end token."""
        answers = []
        for ids in prompts:
            answers.append(self.continuation(ids, new_tokens))
            counter.advance(1)
        return answers

    @abstractmethod
    def times(self, batch: int, prompt: int, new: int) -> list[float]:
        """Return seconds: of a prefill of random prompts, then of each of `new` decoding steps."""

    @abstractmethod
    def flops(self, tokens: int, past: int = 0) -> int | None:
        """FLOPs to read `tokens` tokens after `past` cached ones; None if unknown."""

    def sums(self, text: Text, metric: str) -> tuple[list[float], list[int]]:
        """Return a metric's sum of values per window, and the number of scored tokens per window.

        The first call for a text computes all metrics that read logits in one pass over the text.
        """
        if text.name not in self._sums:
            self._sums[text.name] = self._read(text)
        text_sums = self._sums[text.name]
        return text_sums.sums[metric], text_sums.counts

    @torch.no_grad()
    def _read(self, text: Text) -> TextSums:
        metrics = {
            name: metric
            for name, metric in self.logit_metrics.items()
            if self.teacher is not None or not metric.READS_TEACHER
        }
        windows, tokens = len(text.sequences), int(text.sequences.real.sum())
        text_sums = TextSums([0] * windows, {name: [0.0] * windows for name in metrics})
        with progress(f"evaluate {self.label} on {text.name}", tokens) as counter:
            for window, logits_NV, targets_N in self.logits(text, counter):
                done, teacher_NV = text_sums.counts[window], None
                if any(metric.READS_TEACHER for metric in metrics.values()):
                    assert self.teacher is not None
                    part = slice(done, done + len(targets_N))
                    teacher_NV = self.teacher.logits(text.name, window, part, logits_NV.device)
                for name, metric in metrics.items():
                    values_N = _values(name, metric, logits_NV, teacher_NV, targets_N)
                    text_sums.sums[name][window] += float(values_N.cpu().sum(dtype=torch.float64))
                text_sums.counts[window] += len(targets_N)
        return _of_all_ranks(text_sums)


def _of_all_ranks(own: TextSums) -> TextSums:
    """Sums of the windows of all processes; each window belongs to one of them."""
    counts, sums = zip(*distributed.gathered((own.counts, own.sums)), strict=True)
    return TextSums(
        [max(each) for each in zip(*counts, strict=True)],
        {
            name: [sum(each) for each in zip(*(part[name] for part in sums), strict=True)]
            for name in own.sums
        },
    )


def _values(
    name: str,
    metric: LogitMetric,
    logits_NV: Tensor,
    teacher_NV: Tensor | None,
    targets_N: Tensor,
) -> Tensor:
    """Return a metric's values [N]; a metric that reads the teacher gets only the shared ids."""
    if metric.READS_TEACHER:
        assert teacher_NV is not None
        shared = min(logits_NV.shape[1], teacher_NV.shape[1])
        logits_NV, teacher_NV = logits_NV[:, :shared], teacher_NV[:, :shared]
    values_N = metric.per_token(logits_NV, teacher_NV, targets_N)
    if values_N.shape != targets_N.shape:
        raise UserError(
            f"metric {name}: per_token must return one value per scored token, shape "
            f"{list(targets_N.shape)} (given: {list(values_N.shape)})"
        )
    return values_N


@dataclass(frozen=True)
class Context:
    """Inputs of a metric besides the model; for the teacher, both teacher fields are None."""

    config: EvaluateConfig
    teacher: TeacherOutputs | None = None
    """The teacher's head and its hidden states on the texts."""
    teacher_result: MetricResult | None = None
    """All results of the teacher."""
    tasks: list[Rows] = field(default_factory=list)
    """The tasks to score."""
    cache: ResultCache = field(default_factory=ResultCache)
    """Results that an interrupted evaluation has already stored."""


def mean_per_token(model: EvalModel, text: Text, metric: str) -> tuple[float, float, int]:
    """Return a metric's mean over the scored tokens, its standard error, and the token count.

    The tokens of a window are not independent, so the standard error is that of a ratio estimator
    over windows. Raises UserError if a value is not finite.
    """
    sums, counts = model.sums(text, metric)
    if not all(map(math.isfinite, sums)):
        raise UserError(
            f"{model.label} computes values that are not finite on {text.name}: its checkpoint "
            f"({model.source}) is broken, or overflows in {model.arithmetic}"
        )
    return (*ratio(sums, counts), sum(counts))


def ratio(sums: list[float], counts: Sequence[float]) -> tuple[float, float]:
    """Return Σ sums ÷ Σ counts and its standard error over the clusters (0 for a single cluster).

    se² = k/(k−1) · Σ (s_i − m n_i)² ÷ (Σ n_i)²: linearised ratio estimator (Cochran, 1977, §6.4).
    """
    total, clusters = sum(counts), len(sums)
    mean = sum(sums) / total
    if clusters < 2:
        return mean, 0.0
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return mean, (clusters / (clusters - 1) * squares) ** 0.5 / total


def fit_together(models: Sequence[EvalModel]) -> bool:
    """Whether all models together are expected to fit in the memory of their device."""
    device = models[0].device
    needed = sum(model.bytes_to_load for model in models)
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    in_use = sum(model.bytes_to_load for model in models if model.loaded)
    return bool(needed < MEMORY_SHARE * (free + in_use))


def now(device: torch.device) -> float:
    """Wait until the device has finished its work, then return the clock in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
