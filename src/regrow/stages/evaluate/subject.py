"""One loaded model under measurement, and what the teacher leaves behind for comparison.

N scored tokens of a window, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.progress import progress
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.measured import Kept, Measured
from regrow.stages.evaluate.task_rows import Rows
from regrow.stages.evaluate.texts import IGNORED, Text, in_other_ids
from regrow.training.head import Head, Mix, head_loss, head_of
from regrow.training.tokens import rows_of, token_ids

__all__ = ["Context", "Measured", "Subject", "Teacher", "Window", "mean_loss", "ratio"]


@dataclass(frozen=True)
class Window:
    """Final hidden states [N, H] of a window's scored positions, and the tokens to predict [N]."""

    states_NH: Tensor
    targets_N: Tensor


class Subject:
    """A model on its device, with its texts; final hidden states are kept, logits never are."""

    def __init__(
        self,
        label: str,
        checkpoint: Checkpoint,
        texts: list[Text],
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self.label, self.checkpoint, self.texts = label, checkpoint, texts
        self.dtype, self.device, self.batch_size = dtype, device, batch_size
        self._windows: dict[str, list[Window]] = {}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, loaded when it is first needed."""
        return self.checkpoint.model(self.dtype, self.device)

    def unload(self) -> None:
        """Let the model go; it is loaded again when it is needed."""
        self.__dict__.pop("model", None)
        self.__dict__.pop("head", None)

    @property
    def where(self) -> str:
        """Data type, device and threads."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.device.type == "cuda":
            return f"{dtype} on {torch.cuda.get_device_name(self.device)}"
        return f"{dtype} on {self.device.type} with {torch.get_num_threads()} threads"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.checkpoint.tokenizer()

    @cached_property
    def head(self) -> Head:
        """The output projection, detached: a loss over it then computes no gradients."""
        head = head_of(self.model)
        return replace(head, weight_VH=head.weight_VH.detach())

    def windows(self, text: Text) -> list[Window]:
        """Each window's scored states, in host memory, from one forward pass of the body."""
        if text.name not in self._windows:
            self._windows[text.name] = self.run(text)
        return self._windows[text.name]

    @torch.no_grad()
    def run(self, text: Text) -> list[Window]:
        """Each window's scored states of any text in this model's ids, not kept."""
        found = []
        tokens = int(text.blocks.real.sum())
        with progress(f"evaluate {self.label} on {text.name}", tokens) as counter:
            for batch in text.blocks.batches(self.batch_size):
                ids, positions = batch["input_ids"], batch["position_ids"]
                states_BTH = self.model.base_model(
                    input_ids=ids.to(self.device),
                    position_ids=positions.to(self.device),
                    use_cache=False,
                ).last_hidden_state
                # Position t predicts token t + 1.
                for states_TH, labels_T in zip(states_BTH, batch["labels"], strict=True):
                    scored = labels_T[1:] != IGNORED
                    kept = states_TH[:-1][scored.to(self.device)].cpu()
                    found.append(Window(kept, labels_T[1:][scored]))
                counter.advance(int(batch["real"].sum()))
        return found


@dataclass(frozen=True)
class Teacher:
    """What is kept of the teacher once it is unloaded: its head and its states on each text."""

    label: str
    head: Head
    windows: dict[str, list[Window]]
    restricted: bool = False
    """Whether it read a model's own tokens, with the head's rows of those alone."""

    @classmethod
    def of(cls, subject: Subject, texts: list[Text], ids_V: Tensor | None) -> Teacher:
        """The loaded `subject` as a model's teacher; `ids_V` are its ids of that one's tokens."""
        if ids_V is None:
            windows = {text.name: subject.windows(text) for text in subject.texts}
            ids = slice(token_ids(subject.tokenizer))  # what the embedding has beyond is padding
            head = replace(subject.head, weight_VH=subject.head.weight_VH[ids])
            return cls(subject.label, head, windows)
        head = replace(subject.head, weight_VH=rows_of(subject.head.weight_VH, ids_V))
        return cls(
            subject.label,
            head,
            {text.name: subject.run(in_other_ids(text, ids_V)) for text in texts},
            restricted=True,
        )


@dataclass(frozen=True)
class Context:
    """What a metric may need beside the subject; None of the teacher for the teacher itself."""

    config: EvaluateConfig
    teacher: Teacher | None = None
    """Its states on the texts."""
    theirs: Measured | None = None
    """What was measured of it."""
    tasks: list[Rows] = field(default_factory=list)
    """The tasks to score."""
    kept: Kept = field(default_factory=Kept)
    """What an interrupted evaluation found already."""


@torch.no_grad()
def mean_loss(
    subject: Subject, text: Text, loss: str, teacher: Teacher | None = None
) -> tuple[float, float, int]:
    """Mean of a loss over the scored tokens in nats, its standard error, and their number.

    Logits come from a matrix product in the compute dtype, softmax is float32, sums float64. The
    tokens of a window are not independent, so the standard error is that of a ratio over windows.
    """
    others: list[Window | None] = [None] * len(text.blocks)
    if teacher is not None:
        others = list(teacher.windows[text.name])
    sums, counts = [], []
    for window, other in zip(subject.windows(text), others, strict=True):
        total, _ = head_loss(
            window.states_NH.to(subject.device),
            subject.head,
            window.targets_N.to(subject.device),
            Mix({loss: 1.0}),
            None if other is None else other.states_NH.to(subject.device),
            None if teacher is None else teacher.head,
        )
        sums.append(float(total))
        counts.append(len(window.targets_N))
    if not all(map(math.isfinite, sums)):
        raise UserError(
            f"{subject.label} computes values that are not finite on {text.name}: its checkpoint "
            f"({subject.checkpoint.folder}) is broken, or overflows in {subject.dtype}"
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
