"""A frozen teacher, and several teachers as one mixture of distributions.

A teacher lies outside every module tree, in eval mode. It gives final hidden states and its head.

Shapes: N scored tokens, H hidden channels of all teachers together, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from regrow.training.head import CHUNK_ELEMENTS, Head, head_loss, head_of
from regrow.training.loss_weights import LossWeights
from regrow.training.shared_tokens import NONE, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from regrow.data.sequences import Sequences


class States(NamedTuple):
    """Hidden states of a batch."""

    final: Tensor
    """[B, T − 1, H]: what the output head reads, after the last norm, of predicting positions."""
    layers: tuple[Tensor, ...]
    """[B, T, H] each: the embedding, then every block's output; empty unless asked for."""
    attentions: tuple[Tensor, ...] = ()
    """[B, heads, T, T] each: the weights of every layer; empty unless asked for."""


class Teacher:
    """A frozen model. A plain object, so that no trainer registers, trains or saves it.

    With `ids_V`, its ids for those of a student with other tokens, it reads the student's tokens
    and its head gives the logits of those alone that both have. With `size`, ids from there on are
    padding of its embedding, and its head leaves them out.
    """

    def __init__(
        self, model: PreTrainedModel, ids_V: Tensor | None = None, size: int | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.ids_V = None if ids_V is None else ids_V.to(model.device)
        self.size = size
        self.shared_S: Tensor | None = None
        """Ids of the student that the teacher has too; None: all of them."""
        if self.ids_V is not None and bool((self.ids_V == NONE).any()):
            self.shared_S = (self.ids_V != NONE).nonzero().squeeze(-1)

    @torch.no_grad()
    def hidden(
        self, batch: dict[str, Tensor], all_layers: bool = False, attentions: bool = False
    ) -> States:
        """Hidden states in the teacher's own dtype, outside any autocast."""
        assert not self.model.training, "the teacher left eval mode"
        if self.ids_V is not None:
            own = self.ids_V[batch["input_ids"].to(self.ids_V.device)]
            batch = {**batch, "input_ids": own}
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            return hidden_states(self.model, batch, all_layers, attentions)

    @cached_property
    def head(self) -> Head:
        """The teacher's output head."""
        whole = head_of(self.model)
        if self.ids_V is None:
            return replace(whole, weight_VH=whole.weight_VH[: self.size])
        ids = self.ids_V if self.shared_S is None else self.ids_V[self.shared_S]
        return replace(whole, weight_VH=rows_of(whole.weight_VH, ids))

    def compared(self, head: Head, targets_N: Tensor) -> tuple[Head, Tensor]:
        """A student's head and targets [N] over the ids that this teacher's head is over."""
        if self.shared_S is None:
            return head, targets_N
        shared_S = self.shared_S.to(targets_N.device)
        return replace(head, weight_VH=rows_of(head.weight_VH, shared_S)), torch.searchsorted(
            shared_S, targets_N
        )

    @torch.no_grad()
    def mass_outside(self, sequences: Sequences, batch_size: int) -> float:
        """Mean share of its probability, over the scored tokens, on ids that its head leaves out.

        1 − Σ_shared p: what is lost when the distribution is renormalised over the shared tokens.
        """
        whole, lost, count = head_of(self.model), 0.0, 0
        for batch in sequences.batches(batch_size):
            batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            hidden_NH = self.hidden(batch).final[scored(batch)]
            for part_NH in hidden_NH.split(max(16, CHUNK_ELEMENTS // len(whole.weight_VH))):
                shared_N, all_N = (
                    head.logits(part_NH, head.weight_VH).double().logsumexp(-1)
                    for head in (self.head, whole)
                )
                lost += float(-(shared_N - all_N).expm1().sum())
            count += len(hidden_NH)
        return lost / max(count, 1)


def hidden_states(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    all_layers: bool = False,
    attentions: bool = False,
) -> States:
    """The final hidden states of a batch and, if asked for, those and the attention of all layers.

    Attention weights come from a model with eager attention only.
    """
    device = model.device
    outputs = model.base_model(
        input_ids=batch["input_ids"].to(device),
        position_ids=batch["position_ids"].to(device),
        use_cache=False,
        output_hidden_states=all_layers,
        output_attentions=attentions,
    )
    weights = outputs.attentions or ()
    assert attentions == bool(weights) and None not in weights, "not eager: no attention weights"
    return States(outputs.last_hidden_state[:, :-1], outputs.hidden_states or (), weights)


def final_hidden(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The hidden states [B, T − 1, H] that the output head reads, after the last norm."""
    return hidden_states(model, batch).final


def reference_states(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """Per batch, the final hidden states [N, H] of its scored positions."""
    return [final_hidden(model, batch)[scored(batch)] for batch in batches]


def mean_loss(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    reference: Sequence[Tensor],
    head: Head,
    loss: str,
    exact: bool = False,
) -> float:
    """Mean of a loss over the scored tokens, against a teacher's final hidden states and head.

    `reference` holds the teacher's states: see `reference_states`.
    """
    total, tokens = 0.0, 0
    mix = LossWeights({loss: 1.0}, exact=exact)
    for batch, teacher_NH in zip(batches, reference, strict=True):
        mask = scored(batch)
        hidden_NH = final_hidden(model, batch)[mask]
        targets_N = batch["labels"][:, 1:][mask].to(hidden_NH.device)
        value, _ = head_loss(hidden_NH, head_of(model), targets_N, mix, teacher_NH, head)
        total, tokens = total + float(value), tokens + len(targets_N)
    return total / tokens


def scored(batch: dict[str, Tensor]) -> Tensor:
    """Which of the T − 1 predicting positions are scored [B, T − 1]: t is scored by label t + 1."""
    return batch["labels"][:, 1:] != -100


@dataclass(frozen=True)
class TeacherMixture:
    """The heads of several teachers, read as one; `shares` sum to 1."""

    heads: tuple[Head, ...]
    shares: tuple[float, ...]

    @property
    def rows(self) -> int:
        """How many leading ids all of them have."""
        return min(head.rows for head in self.heads)

    def to(self, dtype: torch.dtype) -> TeacherMixture:
        """The same with weights of a dtype."""
        return TeacherMixture(tuple(head.to(dtype) for head in self.heads), self.shares)

    def target(self, hidden_NH: Tensor, rows: int, mix: LossWeights) -> Tensor:
        """Logits [N, V] whose softmax over T is Σ wᵢ pᵢ, each pᵢ the softmax of logits over T.

        `hidden_NH` has the teachers' states side by side. T · log Σ wᵢ pᵢ, in log space throughout.
        """
        widths = [head.weight_VH.shape[1] for head in self.heads]
        total_NV: Tensor | None = None
        for head, share, own_NH in zip(
            self.heads, self.shares, hidden_NH.split(widths, -1), strict=True
        ):
            logits_NV = head.target(own_NH.contiguous(), rows, mix) / mix.temperature
            log_p_NV = logits_NV.log_softmax(-1).add_(math.log(share))
            total_NV = log_p_NV if total_NV is None else torch.logaddexp(total_NV, log_p_NV)
        assert total_NV is not None, "a blend holds at least one teacher"
        return total_NV.mul_(mix.temperature)


class MixedTeacher:
    """Stands in for a Teacher. All of them must have all of the student's tokens."""

    def __init__(self, teachers: Sequence[Teacher], shares: Sequence[float]) -> None:
        assert all(teacher.shared_S is None for teacher in teachers), "not the same ids compared"
        assert math.isclose(sum(shares), 1.0), f"the shares sum to {sum(shares)}"
        self.teachers, self.shares = tuple(teachers), tuple(shares)

    def hidden(self, batch: dict[str, Tensor], **reads: bool) -> States:
        """The final hidden states of all teachers, side by side."""
        assert not any(reads.values()), "a blend has no states of inner layers"
        found = [teacher.hidden(batch).final for teacher in self.teachers]
        return States(torch.cat([state.to(found[0].dtype) for state in found], -1), ())

    @cached_property
    def head(self) -> TeacherMixture:
        """The output heads."""
        return TeacherMixture(tuple(teacher.head for teacher in self.teachers), self.shares)

    def compared(self, head: Head, targets_N: Tensor) -> tuple[Head, Tensor]:
        """A student's head and targets as they are: all of its tokens are compared."""
        return head, targets_N
