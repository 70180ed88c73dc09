"""Shares of text sources that follow their excess loss: dynamic batch loading.

Xia et al., 2023, arXiv:2310.06694, algorithm 1: at each evaluation, the share of source i becomes
w_i · exp(max(0, loss_i − reference_i)), divided by the sum over all sources. A source in which the
model is further behind its reference gets more of the next tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from regrow.data.sequences import Sequences
from regrow.training.head import head_loss
from regrow.training.loss_weights import LossWeights
from regrow.training.teacher import Teacher, scored

LOSS = "cross_entropy"
"""The loss whose excess counts."""


def updated(
    shares: Sequence[float], losses: Sequence[float], references: Sequence[float]
) -> list[float]:
    """The shares after an evaluation; all lists have one number for each source."""
    excess = [max(0.0, loss - goal) for loss, goal in zip(losses, references, strict=True)]
    pairs = list(zip(shares, excess, strict=True))
    # exp of a large excess overflows; a share that has become 0 stays 0.
    largest = max(each for share, each in pairs if share > 0)
    raised = [share * math.exp(min(0.0, each - largest)) for share, each in pairs]
    return [each / sum(raised) for each in raised]


class DynamicBlend:
    """The source of each training sequence, by shares that change at evaluations.

    `changes` has the number of the first sequence and the shares from there on. Inside each such
    range, the next sequence is of the source furthest below its share, and a source's sequences are
    read in order. All of that follows from `changes`, so a continued run reads the same sequences.
    """

    def __init__(
        self, names: Sequence[str], weights: Sequence[float], references: Sequence[float] = ()
    ) -> None:
        self.names, self.references = list(names), list(references)
        self.changes = [(0, [weight / sum(weights) for weight in weights])]
        self._forget(0)

    @property
    def shares(self) -> list[float]:
        """The newest shares."""
        return self.changes[-1][1]

    def update(self, losses: Sequence[float], first: int) -> None:
        """Change the shares by the losses of an evaluation, from sequence `first` on."""
        assert first >= self.changes[-1][0], (first, self.changes)
        self.changes.append((first, updated(self.shares, losses, self.references)))
        self._forget(first)

    def place(self, number: int) -> tuple[int, int]:
        """The source of a sequence, and its number among the sequences of that source."""
        while len(self._placed) <= number:
            self._place_next()
        return self._placed[number]

    def state_dict(self) -> dict[str, Any]:
        """All changes so far and the references, as JSON can store them."""
        return {"changes": self.changes, "references": self.references}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the state of a checkpoint."""
        self.changes = [(int(first), list(shares)) for first, shares in state["changes"]]
        self.references = list(state["references"])
        self._forget(0)

    def _forget(self, first: int) -> None:
        """Drop the places from sequence `first` on."""
        placed = self._placed[:first] if first else []
        self._placed: list[tuple[int, int]] = placed
        self._read = [0] * len(self.names)
        self._here = [0] * len(self.names)
        for number, (source, _) in enumerate(placed):
            self._count(number, source)

    def _place_next(self) -> None:
        number = len(self._placed)
        begin, shares = self._change_at(number)
        if begin == number:
            self._here = [0] * len(self.names)
        so_far = number - begin + 1
        short = [share * so_far - count for share, count in zip(shares, self._here, strict=True)]
        source = short.index(max(short))
        self._placed.append((source, self._read[source]))
        self._count(number, source)

    def _count(self, number: int, source: int) -> None:
        if any(number == first for first, _ in self.changes):
            self._here = [0] * len(self.names)
        self._read[source] += 1
        self._here[source] += 1

    def _change_at(self, number: int) -> tuple[int, list[float]]:
        return next(change for change in reversed(self.changes) if change[0] <= number)


class BlendedSequences(Dataset[dict[str, Tensor]]):
    """`length` sequences, each of the source that the blend gives it.

    A source whose sequences are used up starts again from its first one.
    """

    def __init__(self, sources: Sequence[Sequences], blend: DynamicBlend, length: int) -> None:
        self.sources, self.blend, self.length = list(sources), blend, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        source, position = self.blend.place(number)
        return self.sources[source][position % len(self.sources[source])]


@torch.no_grad()
def teacher_losses(teacher: Teacher, sets: Sequence[Sequences], batch_size: int) -> list[float]:
    """The teacher's cross-entropy on each set of sequences, in nats per scored token."""
    losses, device = [], teacher.model.device
    weights = LossWeights({LOSS: 1.0}, exact=True)
    for sequences in sets:
        total = tokens = 0.0
        for batch in sequences.batches(batch_size):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            mask = scored(batch)
            targets_N = batch["labels"][:, 1:][mask]
            if teacher.shared_S is not None:
                targets_N = torch.searchsorted(teacher.shared_S, targets_N)
            hidden_NH = teacher.hidden(batch).final[mask]
            loss, _ = head_loss(hidden_NH, teacher.head, targets_N, weights)
            total, tokens = total + float(loss), tokens + len(targets_N)
        losses.append(total / max(1.0, tokens))
    return losses
