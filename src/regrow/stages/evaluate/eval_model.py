"""A model under measurement, and what the teacher leaves behind for comparison.

N scored tokens of a window, H hidden.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow.errors import UserError
from regrow.stage_dir import Figure, write_json
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.task_rows import Rows
from regrow.stages.evaluate.texts import Text
from regrow.training.head import Head


@dataclass(frozen=True)
class MetricResult:
    """What a metric found."""

    figures: list[Figure] = field(default_factory=list)
    generations: list[dict[str, str]] = field(default_factory=list)
    items: dict[str, list[float]] = field(default_factory=dict)
    """By a figure's name the scores of single items, in the order of the rows."""

    def extend(self, other: MetricResult) -> None:
        """Take over what another metric found."""
        self.figures.extend(other.figures)
        self.generations.extend(other.generations)
        self.items.update(other.items)


class ResultCache:
    """Results of one model's metrics in a folder, so that an interrupted evaluation goes on."""

    def __init__(self, folder: Path | None = None, model: int = 0) -> None:
        self.folder, self.model = folder, model

    def get(self, name: str, make: Callable[[], MetricResult]) -> MetricResult:
        """What is kept under `name`, else what `make` finds, which is kept then."""
        if self.folder is None:
            return make()
        path = self._path(self.folder, name)
        if path.exists():
            found = json.loads(path.read_text())
            figures = [Figure.model_validate(figure) for figure in found.pop("figures")]
            return MetricResult(figures, **found)
        made = make()
        self.folder.mkdir(exist_ok=True)
        dumped = [figure.model_dump(mode="json") for figure in made.figures]
        parts = {"generations": made.generations, "items": made.items}
        write_json(path, {"figures": dumped, **parts})
        return made

    def has(self, name: str) -> bool:
        """Whether there is a result under `name`."""
        return self.folder is not None and self._path(self.folder, name).exists()

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{self.model}-{quote(name, safe='')}.json"


@dataclass(frozen=True)
class Window:
    """Final hidden states [N, H] of a window's scored positions, and the tokens to predict [N]."""

    states_NH: Tensor
    targets_N: Tensor


class EvalModel(ABC):
    """A model with its texts, as metrics see it: a folder by transformers, or a file by llama.cpp.

    Loaded when it is first needed.
    """

    label: str
    texts: list[Text]
    device: torch.device
    batch_size: int
    source: Path
    """Folder or file."""
    arithmetic: str
    """What it computes in, or by."""
    engine: str
    """What runs it: only speeds of the same compare."""
    next_tokens: str
    """What generation is timed on: `greedy` tokens or given ones."""

    @property
    @abstractmethod
    def where(self) -> str:
        """What it runs on, and with how many threads."""

    @property
    @abstractmethod
    def bytes_to_load(self) -> float:
        """Bytes that it takes when loaded, about."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""

    @abstractmethod
    def load(self) -> None:
        """Have it in memory."""

    @abstractmethod
    def unload(self) -> None:
        """Let the model go; it is loaded again when it is needed."""

    @abstractmethod
    def sums(
        self, text: Text, loss: str, teacher: TeacherOutputs | None
    ) -> tuple[list[float], list[int]]:
        """Per window the sum of a loss over its scored tokens, in nats, and their number."""

    @abstractmethod
    def continuation(self, ids: list[int], new_tokens: int) -> list[int]:
        """At most `new_tokens` greedy tokens after `ids`, without the one that ends them."""

    @abstractmethod
    def times(self, batch: int, prompt: int, new: int) -> list[float]:
        """Seconds to read a batch of prompts of random tokens, then for each of `new` more."""

    @abstractmethod
    def flops(self, tokens: int, past: int = 0) -> int | None:
        """Operations to read `tokens` after `past` cached ones; None where that is not known."""


@dataclass(frozen=True)
class TeacherOutputs:
    """What is kept of the teacher once it is unloaded: its head and its states on each text."""

    label: str
    head: Head
    windows: dict[str, list[Window]]
    restricted: bool = False
    """Whether it read a model's own tokens, with the head's rows of those alone."""


@dataclass(frozen=True)
class Context:
    """What a metric may need beside the subject; None of the teacher for the teacher itself."""

    config: EvaluateConfig
    teacher: TeacherOutputs | None = None
    """Its states on the texts."""
    theirs: MetricResult | None = None
    """What was measured of it."""
    tasks: list[Rows] = field(default_factory=list)
    """The tasks to score."""
    kept: ResultCache = field(default_factory=ResultCache)
    """What an interrupted evaluation found already."""


def mean_loss(
    subject: EvalModel, text: Text, loss: str, teacher: TeacherOutputs | None = None
) -> tuple[float, float, int]:
    """Mean of a loss over the scored tokens in nats, its standard error, and their number.

    The tokens of a window are not independent, so the standard error is that of a ratio over
    windows.
    """
    sums, counts = subject.sums(text, loss, teacher)
    if not all(map(math.isfinite, sums)):
        raise UserError(
            f"{subject.label} computes values that are not finite on {text.name}: its checkpoint "
            f"({subject.source}) is broken, or overflows in {subject.arithmetic}"
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


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
