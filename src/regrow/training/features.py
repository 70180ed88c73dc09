"""Feature losses: pairs the layers, channels and heads of two models, and weights the losses.

Shapes: B sequences, T tokens, N masked tokens, H hidden channels, A attention heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regrow import plugins
from regrow.errors import UserError
from regrow.plan import Plan
from regrow.runtime.precision import widen
from regrow.training.head import Head
from regrow.training.teacher import States

FEATURE_LOSSES = "regrow.training.feature_losses"
EMBEDDINGS = "embeddings"
MAIN = "main"
"""The name, among means of losses, of the weighted sum of the output losses."""
DECAY = 0.98
"""Decay of the running means per optimizer step; they average about 50 steps."""

Pairs = tuple[tuple[int, int], ...]


class ModelFeatures(NamedTuple):
    """One model's states on a batch, with the final norm and head that turn a state into logits."""

    layers: tuple[Tensor, ...]
    """[B, T, H] each: outputs of the embedding and of every layer; the last is after the norm."""
    attentions: tuple[Tensor, ...]
    """[B, A, T, T] each: every layer's attention weights by query and key, if requested."""
    norm: Callable[[Tensor], Tensor]
    """The final norm."""
    head: Head


def model_features(model: Any, states: States, head: Head) -> ModelFeatures:
    """The states of `model`, with its final norm and its output head."""
    return ModelFeatures(states.layers, states.attentions, final_norm(model), head)


def final_norm(model: Any) -> Callable[[Tensor], Tensor]:
    """The norm before the output head; raises UserError for a model without `base_model.norm`."""
    norm: Callable[[Tensor], Tensor] | None = getattr(model.base_model, "norm", None)
    if norm is None:
        raise UserError(f"{model.config.model_type}: no final norm found; feature losses need one")
    return norm


def give_attentions(model: Any) -> None:
    """Make the model return its attention weights, which fused kernels do not compute."""
    model.set_attn_implementation("eager")


@dataclass(frozen=True)
class LayerMapping:
    """Pairs of layers, channels and heads to compare; has learned projections without a plan."""

    outputs: Pairs
    """(student layer, teacher layer) whose outputs are compared. The last layer is left out,
    because the output losses depend on it directly."""
    layers: Pairs
    """(student layer, teacher layer) whose attention weights are compared."""
    channels: tuple[int, ...] | None = None
    """The teacher's channels that the student kept; None for all."""
    heads: dict[int, tuple[int, ...]] | None = None
    """The teacher's query heads that each student layer kept, in its order; None for all."""
    lens: Pairs = ()
    """The pairs of `outputs` that logit-lens losses read through the output heads."""
    mean_heads: bool = False
    """Whether the mean over the heads is compared, because heads cannot be paired."""
    projections: dict[str, nn.Parameter] = field(default_factory=dict)
    """[student's H, teacher's H] each, by name of the state; they are not in any module tree."""

    @classmethod
    def of_plan(cls, plan: Plan) -> LayerMapping:
        """The mapping of a student that was cut by `plan`.

        A student layer's output is compared with the output of the teacher layer before the next
        kept layer, so that the next layer receives the same input as in the teacher.
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
        """The mapping of a model to itself."""
        layers = tuple((n, n) for n in range(num_layers))
        return cls(layers[:-1], layers)

    @classmethod
    def by_depth(cls, student_layers: int, teacher_layers: int) -> LayerMapping:
        """Pair layers of equal relative depth (TinyBERT; Jiao et al., 2020, arXiv:1909.10351)."""
        depths = (
            (n, max(1, round((n + 1) * teacher_layers / student_layers)) - 1)
            for n in range(student_layers)
        )
        layers = tuple(depths)
        outputs = tuple((s, t) for s, t in layers[:-1] if t < teacher_layers - 1)
        return cls(outputs, layers, mean_heads=True)

    def project(self, channels: tuple[int, int], needs: frozenset[str], seed: int) -> None:
        """Add projections from student to teacher channels for the states in `needs`.

        `channels` is (student's channels, teacher's channels).
        """
        student, teacher = channels
        names = [EMBEDDINGS] if EMBEDDINGS in needs else []
        names += [f"layer {n}" for n, _ in self.outputs] if "outputs" in needs else []
        generator = torch.Generator().manual_seed(seed)
        for name in names:
            weight = torch.empty(student, teacher)
            # This gain preserves the mean square of a channel.
            gain = max(1.0, teacher / student) ** 0.5
            nn.init.orthogonal_(weight, gain, generator=generator)
            self.projections[name] = nn.Parameter(weight)

    def read_at(self, lens: Pairs) -> LayerMapping:
        """A copy of the mapping in which these pairs of outputs are read by logit-lens losses."""
        return replace(self, lens=lens)

    def embedded(
        self, student: ModelFeatures, teacher: ModelFeatures, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The outputs [N, H] of both embeddings, in the same channels."""
        return self._aligned(student.layers[0], teacher.layers[0], mask_BT, EMBEDDINGS)

    def states(
        self, student: ModelFeatures, teacher: ModelFeatures, mask_BT: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the outputs [N, H] of every pair of layers, in the same channels."""
        for student_layer, teacher_layer in self.outputs:
            pair = student.layers[student_layer + 1], teacher.layers[teacher_layer + 1]
            yield self._aligned(*pair, mask_BT, f"layer {student_layer}")

    def attended(
        self, student: ModelFeatures, teacher: ModelFeatures, mask_BT: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the attention weights [N, A, T] of every pair of layers, head by head."""
        for student_layer, teacher_layer in self.layers:
            q_BATT = student.attentions[student_layer]
            p_BATT = teacher.attentions[teacher_layer]
            if self.heads is not None and student_layer in self.heads:
                p_BATT = p_BATT[:, list(self.heads[student_layer])]
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
    """The pairs at these depths of the student, in ascending order, without duplicates.

    A depth is the number of a layer, from 0, or a share of the student's `num_layers` layers
    between 0 and 1, which is rounded to a whole layer. Raises UserError for the last layer and
    for numbers beyond it.
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
                f"lens_layers: {depth} is not a layer before the student's last one that is paired "
                f"with a teacher layer; give shares between 0 and 1, or layer numbers ({allowed})"
            )
        chosen.add(int(layer))
    return tuple((layer, teacher_of[layer]) for layer in sorted(chosen))


@dataclass(frozen=True)
class FeatureLosses:
    """A weighted sum of feature losses; the keys of `weights` are their file names."""

    weights: dict[str, float]
    mapping: LayerMapping
    balancer: LossBalancer | None = None

    @property
    def needs(self) -> frozenset[str]:
        """The union of the states that the feature losses read."""
        return needs_of(self.weights)

    @property
    def reads(self) -> dict[str, bool]:
        """The arguments of `hidden_states` that request these states."""
        attentions = "attentions" in self.needs
        return {"all_layers": True, "attentions": attentions}

    def loss(
        self, student: ModelFeatures, teacher: ModelFeatures, mask_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum over the masked tokens, and the unweighted sum of each loss by name."""
        total, parts = torch.zeros((), device=mask_BT.device), {}
        for name, weight in self.weights.items():
            module = plugins.load(FEATURE_LOSSES, name)
            value = module.loss(student, teacher, self.mapping, mask_BT)
            parts[name] = value.detach()
            factor = 1.0 if self.balancer is None else self.balancer.factor(name)
            total = total + weight * factor * value
        return total, parts

    def projections(self) -> list[nn.Parameter]:
        """The learned projections, which are not part of the student."""
        return list(self.mapping.projections.values())

    def to(self, device: torch.device) -> None:
        """Move the projections, in place, before an optimizer has them."""
        for projection in self.projections():
            projection.data = projection.data.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs; empty if nothing is learned."""
        projections = self.mapping.projections
        state: dict[str, Any] = {name: weight.detach() for name, weight in projections.items()}
        return state if self.balancer is None else {**state, "balance": self.balancer.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        with torch.no_grad():
            for name, weight in self.mapping.projections.items():
                weight.copy_(state[name])
        if self.balancer is not None:
            self.balancer.sums = dict(state["balance"])


def needs_of(weights: dict[str, float]) -> frozenset[str]:
    """The union of the feature losses' NEEDS."""
    return frozenset().union(*(plugins.load(FEATURE_LOSSES, name).NEEDS for name in weights))


class LossBalancer:
    """Computes a factor per feature loss: running mean of the main loss ÷ that of the feature loss.

    Both are exponential means over optimizer steps that start at 0, so that their initial bias
    cancels. The factor is constant within a step, for all its micro-batches. In the first step the
    factor is 0: the feature losses are only measured.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def factor(self, name: str) -> float:
        """The factor by which the weight of feature loss `name` is multiplied in this step."""
        mean = self.sums.get(name, 0.0)
        return self.sums[MAIN] / mean if mean > 0 else 0.0

    def update(self, means: dict[str, float]) -> None:
        """Update the running means with a step's means per scored token, of MAIN and each loss."""
        for name, value in means.items():
            self.sums[name] = DECAY * self.sums.get(name, 0.0) + (1 - DECAY) * value
