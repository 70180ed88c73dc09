"""A model under measurement, what is kept of the teacher, and what a metric returns.

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
from regrow.runtime.progress import Progress, progress
from regrow.stage_dir import Figure, write_json
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.task_rows import Rows
from regrow.stages.evaluate.texts import Text
from regrow.training.head import Head

MEMORY_SHARE = 0.5
"""Share of the free memory that models may take which are loaded at the same time."""


@dataclass(frozen=True)
class MetricResult:
    """The figures of one metric on one model, and what belongs to them."""

    figures: list[Figure] = field(default_factory=list)
    generations: list[dict[str, str]] = field(default_factory=list)
    items: dict[str, list[float]] = field(default_factory=dict)
    """By a figure's name the scores of single items, in the order of the rows."""

    def extend(self, other: MetricResult) -> None:
        """Add the results of another metric."""
        self.figures.extend(other.figures)
        self.generations.extend(other.generations)
        self.items.update(other.items)


class ResultCache:
    """Results of one model's metrics in a folder, so that an interrupted evaluation continues."""

    def __init__(self, folder: Path | None = None, model: int = 0) -> None:
        self.folder, self.model = folder, model

    def get(self, name: str, compute: Callable[[], MetricResult]) -> MetricResult:
        """The stored result of `name`; without one, `compute()`, which is then stored."""
        if self.folder is None:
            return compute()
        path = self._path(self.folder, name)
        if path.exists():
            stored = json.loads(path.read_text())
            figures = [Figure.model_validate(figure) for figure in stored.pop("figures")]
            return MetricResult(figures, **stored)
        result = compute()
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
    """A metric's file that reads logits: see docs/add-a-metric.md."""

    READS_TEACHER: bool
    """Whether it compares with the teacher's logits; it has no figures of the teacher then."""

    @staticmethod
    def per_token(logits_NV: Tensor, teacher_NV: Tensor | None, targets_N: Tensor) -> Tensor:
        """One value [N] per scored token; the logits must not be changed."""


@dataclass(frozen=True)
class Window:
    """Final hidden states [N, H] of a window's scored positions, and the tokens to predict [N]."""

    states_NH: Tensor
    targets_N: Tensor


@dataclass(frozen=True)
class TeacherOutputs:
    """What is kept of the teacher once it is unloaded: its head and its states on each text."""

    label: str
    head: Head
    vocab_size: int
    """Leading ids of its head that are tokens; those beyond are padding of the embedding."""
    windows: dict[str, list[Window]]
    restricted: bool = False
    """Whether it read a model's own tokens, with the head's rows of those alone."""

    def logits(self, text: str, window: int, part: slice, device: torch.device) -> Tensor:
        """Its logits [N, vocab_size] at the scored positions `part` of a window, on `device`."""
        weight_VH = self.head.weight_VH
        states_NH = self.windows[text][window].states_NH[part].to(weight_VH.device)
        logits_NV = self.head.logits(states_NH, weight_VH, exact=True)
        return logits_NV[:, : self.vocab_size].to(device)


@dataclass
class TextSums:
    """Per window of a text the number of scored tokens and, by metric, the sum of its values."""

    counts: list[int]
    sums: dict[str, list[float]]


class EvalModel(ABC):
    """A model with its texts, as metrics see it: a folder by transformers, or a file by llama.cpp.

    It is loaded when it is first needed.
    """

    device: torch.device
    batch_size: int
    source: Path
    """Folder or file."""
    arithmetic: str
    """The data type it computes in, or the program that runs it."""
    engine: ClassVar[str]
    """The program that runs it; speeds compare only within one program."""
    next_tokens: ClassVar[str]
    """The tokens whose generation is timed: `greedy` or `random` ones."""

    def __init__(
        self,
        label: str,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[Text],
        logit_metrics: Mapping[str, LogitMetric],
    ) -> None:
        self.label, self.tokenizer, self.texts = label, tokenizer, texts
        self.logit_metrics = logit_metrics
        """The metrics that one pass over a text computes, by name."""
        self.teacher: TeacherOutputs | None = None
        """What they compare with. Without it, those that read the teacher are left out."""
        self._sums: dict[str, TextSums] = {}

    @property
    def loaded(self) -> bool:
        """Whether it is in memory."""
        return "model" in vars(self)

    @property
    @abstractmethod
    def where(self) -> str:
        """What it runs on, and with how many threads."""

    @property
    @abstractmethod
    def bytes_to_load(self) -> float:
        """Approximate bytes of memory that it takes when loaded."""

    @abstractmethod
    def load(self) -> None:
        """Load it, unless it is loaded."""

    @abstractmethod
    def unload(self) -> None:
        """Free its memory; it is loaded again when it is needed."""

    @abstractmethod
    def logits(self, text: Text, counter: Progress) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Window by window, the logits [N, V] at some scored positions and their targets [N].

        In float32 at least, a chunk at a time: (number of the window, logits, targets).
        """

    @abstractmethod
    def continuation(self, ids: list[int], new_tokens: int) -> list[int]:
        """At most `new_tokens` greedy tokens after `ids`, without the one that ends them."""

    @abstractmethod
    def times(self, batch: int, prompt: int, new: int) -> list[float]:
        """Seconds to read a batch of prompts of random tokens, then for each of `new` more."""

    @abstractmethod
    def flops(self, tokens: int, past: int = 0) -> int | None:
        """Operations to read `tokens` after `past` cached ones; None where that is not known."""

    def sums(self, text: Text, metric: str) -> tuple[list[float], list[int]]:
        """Per window the sum of a metric's values over its scored tokens, and their number.

        The first call for a text makes one pass over it, for all metrics that read logits.
        """
        if text.name not in self._sums:
            self._sums[text.name] = self._read(text)
        read = self._sums[text.name]
        return read.sums[metric], read.counts

    @torch.no_grad()
    def _read(self, text: Text) -> TextSums:
        metrics = {
            name: metric
            for name, metric in self.logit_metrics.items()
            if self.teacher is not None or not metric.READS_TEACHER
        }
        windows, tokens = len(text.sequences), int(text.sequences.real.sum())
        read = TextSums([0] * windows, {name: [0.0] * windows for name in metrics})
        with progress(f"evaluate {self.label} on {text.name}", tokens) as counter:
            for window, logits_NV, targets_N in self.logits(text, counter):
                done, teacher_NV = read.counts[window], None
                if any(metric.READS_TEACHER for metric in metrics.values()):
                    assert self.teacher is not None
                    part = slice(done, done + len(targets_N))
                    teacher_NV = self.teacher.logits(text.name, window, part, logits_NV.device)
                for name, metric in metrics.items():
                    values_N = _values(name, metric, logits_NV, teacher_NV, targets_N)
                    read.sums[name][window] += float(values_N.cpu().sum(dtype=torch.float64))
                read.counts[window] += len(targets_N)
        return read


def _values(
    name: str,
    metric: LogitMetric,
    logits_NV: Tensor,
    teacher_NV: Tensor | None,
    targets_N: Tensor,
) -> Tensor:
    """A metric's values [N]; one that reads the teacher gets only the ids that both have."""
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
    """What a metric may need beside the model. For the teacher itself, both results are None."""

    config: EvaluateConfig
    teacher: TeacherOutputs | None = None
    """The teacher's states on the texts."""
    teacher_result: MetricResult | None = None
    """All that was measured of the teacher."""
    tasks: list[Rows] = field(default_factory=list)
    """The tasks to score."""
    cache: ResultCache = field(default_factory=ResultCache)
    """What an interrupted evaluation has stored already."""


def mean_per_token(model: EvalModel, text: Text, metric: str) -> tuple[float, float, int]:
    """Mean of a metric's values over the scored tokens, its standard error, and their number.

    The tokens of a window are not independent, so the standard error is that of a ratio over
    windows. Raises UserError for a mean that is not finite.
    """
    sums, counts = model.sums(text, metric)
    if not all(map(math.isfinite, sums)):
        raise UserError(
            f"{model.label} computes values that are not finite on {text.name}: its checkpoint "
            f"({model.source}) is broken, or overflows in {model.arithmetic}"
        )
    return (*ratio(sums, counts), sum(counts))


def ratio(sums: list[float], counts: Sequence[float]) -> tuple[float, float]:
    """Σ sums ÷ Σ counts and its standard error over the clusters (0 for a single one).

    se² = k/(k−1) · Σ (s_i − m n_i)² ÷ (Σ n_i)²: linearised ratio estimator (Cochran, 1977, §6.4).
    """
    total, clusters = sum(counts), len(sums)
    mean = sum(sums) / total
    if clusters < 2:
        return mean, 0.0
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return mean, (clusters / (clusters - 1) * squares) ** 0.5 / total


def fit_together(models: Sequence[EvalModel]) -> bool:
    """Whether all models are expected to fit in the memory of their device together."""
    device = models[0].device
    needed = sum(model.bytes_to_load for model in models)
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    taken = sum(model.bytes_to_load for model in models if model.loaded)
    return bool(needed < MEMORY_SHARE * (free + taken))


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
