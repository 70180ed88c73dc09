"""A frozen teacher, the placement of its weights, and a mixture of several teachers.

A teacher is in eval mode and is not part of any module tree. Its outputs are final hidden states
and its output head.

Shapes: B sequences, T tokens, N scored tokens, H hidden channels of all teachers together, V
vocabulary entries, R rows (outputs) and C columns (inputs) of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.checkpoint.from_config import on_meta
from regrow.data.sequences import Sequences
from regrow.layerwise import LayerByLayer
from regrow.quantization.formats import SCHEMES
from regrow.quantization.grid import fit
from regrow.runtime.chunks import CHUNK_ELEMENTS
from regrow.runtime.precision import half
from regrow.training import sharding
from regrow.training.answer_targets import AnswerTargets
from regrow.training.head import Head, head_loss, head_of
from regrow.training.load_once import load_once, send, weights_of
from regrow.training.loss_weights import LossWeights
from regrow.training.model_check import check_model
from regrow.training.shared_tokens import NONE, rows_of

TeacherPlacement: TypeAlias = Literal["whole", "int8", "shares", "node_shares", "disk"]
"""On the device, the same in 8 bits, sharded over all ranks or over those of each node, or read
from disk layer by layer."""
ROUNDED_ELEMENTS = 1 << 24
"""Weights that are rounded to 8 bits at once; sorting them takes some 20 bytes for each."""


class States(NamedTuple):
    """Hidden states of a batch."""

    final: Tensor
    """[B, T − 1, H]: inputs of the output head (after the final norm) at predicting positions."""
    layers: tuple[Tensor, ...]
    """[B, T, H] each: the embedding, then every layer's output; empty unless requested."""
    attentions: tuple[Tensor, ...] = ()
    """[B, heads, T, T] each: the attention weights of every layer; empty unless requested."""


class Teacher:
    """A frozen model. It is not a module, so that no trainer registers, trains or saves it.

    `ids_V` maps the ids of a student with another vocabulary to the teacher's ids. The teacher then
    reads the student's ids, and its head computes logits only for tokens that both have. `size` is
    the number of ids of its tokenizer; its head leaves out further rows, which are padding.
    """

    def __init__(
        self, model: PreTrainedModel, ids_V: Tensor | None = None, size: int | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        check_model(self.model)
        self.ids_V = None if ids_V is None else ids_V.to(model.device)
        self.size = size
        self.targets: AnswerTargets | None = None
        """Distributions that replace its own while the student trains."""
        self.shared_S: Tensor | None = None
        """The student's ids that the teacher also has; None for all of them."""
        if self.ids_V is not None and bool((self.ids_V == NONE).any()):
            self.shared_S = (self.ids_V != NONE).nonzero().squeeze(-1)

    @torch.no_grad()
    def hidden(
        self, batch: dict[str, Tensor], all_layers: bool = False, attentions: bool = False
    ) -> States:
        """Hidden states in the teacher's own dtype, without autocast."""
        assert not self.model.training, "the teacher left eval mode"
        if self.ids_V is not None:
            teacher_ids = self.ids_V[batch["input_ids"].to(self.ids_V.device)]
            batch = {**batch, "input_ids": teacher_ids}
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            return hidden_states(self.model, batch, all_layers, attentions)

    @cached_property
    def head(self) -> Head:
        """The teacher's output head, restricted to the ids that are compared."""
        whole = head_of(self.model)
        if self.ids_V is None:
            return replace(whole, weight_VH=whole.weight_VH[: self.size])
        ids = self.ids_V if self.shared_S is None else self.ids_V[self.shared_S]
        return replace(whole, weight_VH=rows_of(whole.weight_VH, ids))

    def compared(self, head: Head, targets_N: Tensor) -> tuple[Head, Tensor]:
        """A student's head and targets [N], restricted to the ids of this teacher's head."""
        if self.shared_S is None:
            return head, targets_N
        shared_S = self.shared_S.to(targets_N.device)
        return replace(head, weight_VH=rows_of(head.weight_VH, shared_S)), torch.searchsorted(
            shared_S, targets_N
        )

    @torch.no_grad()
    def mass_outside(self, sequences: Sequences, batch_size: int) -> float:
        """The mean probability, over the scored tokens, of the ids that its head leaves out.

        This is 1 − Σ_shared p, the mass that a softmax over only the shared tokens removes.
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
    """The final hidden states of a batch and, if requested, states and attention of all layers.

    Only a model with eager attention returns attention weights.
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
    """The inputs [B, T − 1, H] of the output head, after the final norm."""
    return hidden_states(model, batch).final


def reference_states(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The final hidden states [N, H] of each batch's scored positions."""
    return [final_hidden(model, batch)[scored(batch)] for batch in batches]


def mean_loss(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    reference: Sequence[Tensor],
    head: Head,
    loss: str,
    exact: bool = False,
) -> float:
    """The mean of a loss over the scored tokens, in nats.

    `reference` has the teacher's states from `reference_states`; `head` is the teacher's head. On a
    CPU, `exact` products double the time of the head.
    """
    total, tokens = 0.0, 0
    loss_weights = LossWeights({loss: 1.0}, exact=exact)
    for batch, teacher_NH in zip(batches, reference, strict=True):
        mask = scored(batch)
        hidden_NH = final_hidden(model, batch)[mask]
        targets_N = batch["labels"][:, 1:][mask].to(hidden_NH.device)
        value, _ = head_loss(hidden_NH, head_of(model), targets_N, loss_weights, teacher_NH, head)
        total, tokens = total + float(value), tokens + len(targets_N)
    return total / tokens


def scored(batch: dict[str, Tensor]) -> Tensor:
    """The mask [B, T − 1] of scored positions; position t predicts label t + 1."""
    return batch["labels"][:, 1:] != -100


@dataclass(frozen=True)
class TeacherMixture:
    """Combines the heads of several teachers to one target; `shares` sum to 1."""

    heads: tuple[Head, ...]
    shares: tuple[float, ...]

    @property
    def rows(self) -> int:
        """The number of leading ids that all heads have."""
        return min(head.rows for head in self.heads)

    def to(self, dtype: torch.dtype) -> TeacherMixture:
        """The same mixture with weights of another dtype."""
        return TeacherMixture(tuple(head.to(dtype) for head in self.heads), self.shares)

    def target(self, hidden_NH: Tensor, rows: int, loss_weights: LossWeights) -> Tensor:
        """The logits [N, V] whose softmax at temperature T is Σ wᵢ pᵢ.

        wᵢ is the share of teacher i, and pᵢ its distribution at T. `hidden_NH` is the concatenation
        of the teachers' states. The logits are T · log Σ wᵢ pᵢ, computed in log space.
        """
        widths = [head.weight_VH.shape[1] for head in self.heads]
        total_NV: Tensor | None = None
        for head, share, own_NH in zip(
            self.heads, self.shares, hidden_NH.split(widths, -1), strict=True
        ):
            logits_NV = head.target(own_NH.contiguous(), rows, loss_weights)
            log_p_NV = (logits_NV / loss_weights.temperature).log_softmax(-1).add_(math.log(share))
            total_NV = log_p_NV if total_NV is None else torch.logaddexp(total_NV, log_p_NV)
        assert total_NV is not None, "a mixture has at least one teacher"
        return total_NV.mul_(loss_weights.temperature)


class MixedTeacher:
    """Combines several teachers to one. Each of them must have all of the student's tokens."""

    def __init__(self, teachers: Sequence[Teacher], shares: Sequence[float]) -> None:
        assert all(teacher.shared_S is None for teacher in teachers), (
            "a teacher lacks tokens of the student"
        )
        assert math.isclose(sum(shares), 1.0), f"the shares sum to {sum(shares)}"
        self.teachers, self.shares = tuple(teachers), tuple(shares)

    def hidden(self, batch: dict[str, Tensor], **reads: bool) -> States:
        """The final hidden states of all teachers, concatenated."""
        assert not any(reads.values()), "several teachers have no common states of inner layers"
        finals = [teacher.hidden(batch).final for teacher in self.teachers]
        return States(torch.cat([final.to(finals[0].dtype) for final in finals], -1), ())

    @cached_property
    def head(self) -> TeacherMixture:
        """The mixture of the output heads."""
        return TeacherMixture(tuple(teacher.head for teacher in self.teachers), self.shares)

    def compared(self, head: Head, targets_N: Tensor) -> tuple[Head, Tensor]:
        """Return the student's head and targets unchanged: all of its tokens are compared."""
        return head, targets_N


def place_teacher(
    checkpoint: Checkpoint, placement: TeacherPlacement, device: torch.device
) -> PreTrainedModel:
    """Load a checkpoint as a frozen model, in bfloat16 or what `precision.half` says.

    With `disk`, embedding, final norm and head stay on the device; each layer's weights are read
    from their file whenever the layer runs, and on a GPU while the layer before it runs.
    """
    if placement == "disk":
        family, own = families.of(checkpoint), copy(checkpoint)  # a thread reads its files
        shell = LayerByLayer.of(own, family, device, dtype=half(device))
        return shell.streamed(prefetch=True)
    if placement in ("shares", "node_shares"):
        return _shared(checkpoint, device, in_node=placement == "node_shares")
    model = checkpoint.model(half(device), device if placement == "whole" else "cpu")
    if placement == "int8":
        round_linear(model, device)
    return model


def _shared(checkpoint: Checkpoint, device: torch.device, in_node: bool) -> PreTrainedModel:
    """A model in shards, whose weights process 0 reads and sends."""
    load, config = partial(checkpoint.model, half(device)), checkpoint.stock_config()
    model = load_once(load, lambda: on_meta(config).eval())
    weights = weights_of(model)
    sharding.share(model, device, in_node)
    send(weights, model, device)
    return model


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight and one scale per row.

    y = (x · Qᵀ) · s + b with W ≈ s · Q. bfloat16 represents the integers of Q (at most 128)
    exactly, and the scale multiplies the result, so the product s · Q is never rounded.

    The weight is rounded on `device`, some rows at a time, and stays there.
    """

    codes_RC: Tensor
    scale_R: Tensor

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        super().__init__()
        weight_RC = layer.weight.detach()
        rows = max(1, ROUNDED_ELEMENTS // layer.in_features)
        parts = [_int8(part_RC.to(device)) for part_RC in weight_RC.split(rows)]
        codes, scales = zip(*parts, strict=True)
        self.register_buffer("codes_RC", torch.cat(codes))
        self.register_buffer("scale_R", torch.cat(scales))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """The outputs [..., R] for inputs [..., C], in the dtype of the inputs."""
        y = functional.linear(x, self.codes_RC.to(x.dtype)) * self.scale_R.to(x.dtype)
        return y if self.bias is None else y + self.bias


def _int8(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """The integers [R, C] and the scales [R] of a weight."""
    grid = fit(weight_RC, SCHEMES["int8"], weight_RC.dtype)
    codes_RC = (grid.nearest(weight_RC) / grid.scale_RG.float()).round().to(torch.int8)
    return codes_RC, grid.scale_RG.squeeze(1)


@torch.no_grad()
def round_linear(model: PreTrainedModel, device: torch.device) -> None:
    """Move a model from the host to `device`, with linear layers as Int8Linear except the head.

    They are rounded on the device one after the other, so that it never has more than some rows of
    them in the original dtype. Routers and stacked experts are not linear layers, so they do not
    change.
    """
    head = model.get_output_embeddings()
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    while linear:
        name, module = linear.pop()
        model.set_submodule(name, Int8Linear(module, device))
    model.to(device)  # type: ignore[arg-type]
