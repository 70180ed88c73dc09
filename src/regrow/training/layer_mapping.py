"""Maps student layers, channels and heads to the teacher's, and reads features of both models.

Shapes: B sequences, T tokens, N masked tokens, H hidden channels, A attention heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from regrow.errors import UserError
from regrow.plan import Plan
from regrow.runtime.precision import widen
from regrow.training.head import Head

if TYPE_CHECKING:
    from regrow.training.teacher import States

EAGER = "eager"
"""The attention of transformers that gives its weights away; the fused ones never form them."""


class ModelFeatures(NamedTuple):
    """One model's states on a batch, and how it would read one of them out."""

    layers: tuple[Tensor, ...]
    """[B, T, H] each: the embedding's output, then every block's; the last is after the norm."""
    attentions: tuple[Tensor, ...]
    """[B, A, T, T] each: the weights, by query and key, of every layer; empty unless asked for."""
    norm: Callable[[Tensor], Tensor]
    """The final norm."""
    head: Head


def model_features(model: Any, states: States, head: Head) -> ModelFeatures:
    """The states of `model` with its final norm and the head to read them by."""
    return ModelFeatures(states.layers, states.attentions, final_norm(model), head)


def final_norm(model: Any) -> Callable[[Tensor], Tensor]:
    """The norm before the output head; UserError for a model that has none where all others do."""
    found: Callable[[Tensor], Tensor] | None = getattr(model.base_model, "norm", None)
    if found is None:
        raise UserError(f"{model.config.model_type}: no final norm found; feature losses need one")
    return found


def give_attentions(model: Any) -> None:
    """Make the model form its attention weights, by eager attention."""
    model.set_attn_implementation(EAGER)


Pairs = tuple[tuple[int, int], ...]
EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class LayerMapping:
    """Pairs of blocks, layers, channels and heads; learned projections where there is no plan."""

    outputs: Pairs
    """(student block, teacher block) whose outputs are compared; not the last, which the output
    losses see."""
    layers: Pairs
    """(student layer, teacher layer) whose attention is compared."""
    channels: tuple[int, ...] | None = None
    """The teacher's channels that the student has; None for all."""
    heads: dict[int, tuple[int, ...]] | None = None
    """The teacher's query heads that a student layer has, in its order; None for all."""
    lens: Pairs = ()
    """Those of `outputs` that are read through the output heads."""
    mean_heads: bool = False
    """Whether heads answer to no other head, so that their mean is compared."""
    projections: dict[str, nn.Parameter] = field(default_factory=dict)
    """[student's H, teacher's H] by what it projects; kept here, outside every module tree."""

    @classmethod
    def of_plan(cls, plan: Plan) -> LayerMapping:
        """By the plan that the student was cut by.

        A student block's output answers to that of the teacher block before the next kept one, so
        that the next block gets what it got in the teacher.
        """
        kept = plan.kept_layers()
        outputs = tuple((n, following - 1) for n, following in enumerate(kept[1:]))
        heads = {n: plan.kept("heads", old) for n, old in enumerate(kept)}
        return cls(
            outputs,
            tuple(enumerate(kept)),
            None if plan.hidden is None else tuple(plan.hidden),
            {n: tuple(ids) for n, ids in heads.items() if ids is not None} or None,
        )

    @classmethod
    def of_same(cls, num_layers: int) -> LayerMapping:
        """Of a model with itself."""
        layers = tuple((n, n) for n in range(num_layers))
        return cls(layers[:-1], layers)

    @classmethod
    def by_depth(cls, student_layers: int, teacher_layers: int) -> LayerMapping:
        """Blocks at the same relative depth (TinyBERT; Jiao et al., 2020, arXiv:1909.10351)."""
        depths = (
            (n, max(1, round((n + 1) * teacher_layers / student_layers)) - 1)
            for n in range(student_layers)
        )
        layers = tuple(depths)
        outputs = tuple((s, t) for s, t in layers[:-1] if t < teacher_layers - 1)
        return cls(outputs, layers, mean_heads=True)

    def project(self, channels: tuple[int, int], needs: frozenset[str], seed: int) -> None:
        """Make the projections that `needs` take, [student's, teacher's] channels, orthogonal."""
        student, teacher = channels
        names = [EMBEDDINGS] if EMBEDDINGS in needs else []
        names += [f"block {n}" for n, _ in self.outputs] if "outputs" in needs else []
        draw = torch.Generator().manual_seed(seed)
        for name in names:
            weight = torch.empty(student, teacher)
            # Keeps the mean square of a channel; rows or columns, the fewer ones, are orthogonal.
            gain = max(1.0, teacher / student) ** 0.5
            nn.init.orthogonal_(weight, gain, generator=draw)
            self.projections[name] = nn.Parameter(weight)

    def read_at(self, lens: Pairs) -> LayerMapping:
        """The same match, in which these outputs are read through the output heads."""
        return replace(self, lens=lens)

    def embedded(
        self, student: ModelFeatures, teacher: ModelFeatures, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both embeddings' outputs [N, H] in the same channels."""
        return self._aligned(student.layers[0], teacher.layers[0], mask_BT, EMBEDDINGS)

    def states(
        self, student: ModelFeatures, teacher: ModelFeatures, mask_BT: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The outputs [N, H] of every pair of blocks in the same channels."""
        for ours, theirs in self.outputs:
            pair = student.layers[ours + 1], teacher.layers[theirs + 1]
            yield self._aligned(*pair, mask_BT, f"block {ours}")

    def attended(
        self, student: ModelFeatures, teacher: ModelFeatures, mask_BT: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The attention rows [N, A, T] of every pair of layers, head by head."""
        for ours, theirs in self.layers:
            q_BATT, p_BATT = student.attentions[ours], teacher.attentions[theirs]
            if self.heads is not None and ours in self.heads:
                p_BATT = p_BATT[:, list(self.heads[ours])]
            rows = (widen(x_BATT.transpose(1, 2)[mask_BT]) for x_BATT in (q_BATT, p_BATT))
            q_NAT, p_NAT = (x.mean(1, keepdim=True) if self.mean_heads else x for x in rows)
            yield q_NAT, p_NAT.to(q_NAT)

    def _aligned(
        self, s_BTH: Tensor, t_BTH: Tensor, mask_BT: Tensor, name: str
    ) -> tuple[Tensor, Tensor]:
        s_NH, t_NH = widen(s_BTH[mask_BT]), widen(t_BTH[mask_BT]).to(s_BTH.device)
        if self.channels is not None:
            t_NH = t_NH[:, list(self.channels)]
        if name in self.projections:
            with torch.autocast(s_NH.device.type, enabled=False):
                s_NH = s_NH @ self.projections[name].to(s_NH.dtype)
        return s_NH, t_NH.to(s_NH.dtype)


def at_depths(outputs: Pairs, num_layers: int, depths: Sequence[int | float]) -> Pairs:
    """The pairs at these depths of the student, in ascending order, each once.

    A depth is a share of its `num_layers` blocks, above 0 and below 1 and rounded to a whole block,
    or the number of a block, from 0. Raises UserError for the last block and those beyond.
    """
    teacher_of = dict(outputs)
    chosen = set()
    for depth in depths:
        layer = depth
        if isinstance(depth, float):
            layer = min(max(math.floor(depth * num_layers + 0.5), 1), num_layers - 1) - 1
        if layer not in teacher_of:
            allowed = f"0 to {num_layers - 2}" if num_layers > 1 else "none"
            raise UserError(
                f"lens_layers: {depth} is no block before the student's last with a counterpart in "
                f"the teacher; give shares between 0 and 1, or numbers of blocks ({allowed})"
            )
        chosen.add(int(layer))
    return tuple((layer, teacher_of[layer]) for layer in sorted(chosen))
