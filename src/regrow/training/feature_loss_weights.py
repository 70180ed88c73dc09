"""The feature losses of a distillation: how much each counts, and their automatic balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow import plugins
from regrow.training.layer_mapping import LayerMapping, ModelFeatures

FEATURE_LOSSES = "regrow.training.feature_losses"


@dataclass(frozen=True)
class FeatureLosses:
    """A weighted sum of feature losses; `weights` are by the feature loss's file name."""

    weights: dict[str, float]
    match: LayerMapping
    balance: LossBalancer | None = None

    @property
    def needs(self) -> frozenset[str]:
        """What is read inside the models, all feature losses together."""
        return needs_of(self.weights)

    @property
    def reads(self) -> dict[str, bool]:
        """Which of `hidden_states`' outputs are needed."""
        attentions = "attentions" in self.needs
        return {"all_layers": True, "attentions": attentions}

    def loss(
        self, student: ModelFeatures, teacher: ModelFeatures, mask_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum over the tokens of the mask; the plain sum of each feature loss by name."""
        total, parts = torch.zeros((), device=mask_BT.device), {}
        for name, weight in self.weights.items():
            module = plugins.load(FEATURE_LOSSES, name)
            value = module.loss(student, teacher, self.match, mask_BT)
            parts[name] = value.detach()
            factor = 1.0 if self.balance is None else self.balance.factor(name)
            total = total + weight * factor * value
        return total, parts

    def projections(self) -> list[nn.Parameter]:
        """The learned projections; no part of the student."""
        return list(self.match.projections.values())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on with equal numbers; empty when nothing is learnt."""
        held = self.match.projections
        state: dict[str, Any] = {name: weight.detach() for name, weight in held.items()}
        return state if self.balance is None else {**state, "balance": self.balance.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        with torch.no_grad():
            for name, weight in self.match.projections.items():
                weight.copy_(state[name])
        if self.balance is not None:
            self.balance.sums = dict(state["balance"])


def needs_of(weights: dict[str, float]) -> frozenset[str]:
    """The union of the feature losses' NEEDS."""
    return frozenset().union(*(plugins.load(FEATURE_LOSSES, name).NEEDS for name in weights))


DECAY = 0.98
"""Of the running means, per optimizer step: a memory of about 50 steps."""


MAIN = "main"


class LossBalancer:
    """The factor of a feature loss: running mean of the main loss ÷ its own running mean.

    Both are exponential means over optimizer steps, equally begun, so that what they lack at first
    cancels. Constant within a step, whatever micro-batches it is made of. In the first step nothing
    is known yet, and the feature losses are only measured: their factor is 0.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def factor(self, name: str) -> float:
        """What the weight of feature loss `name` is multiplied by in this step."""
        mean = self.sums.get(name, 0.0)
        return self.sums[MAIN] / mean if mean > 0 else 0.0

    def update(self, means: dict[str, float]) -> None:
        """Take the means per scored token of a step, by name: MAIN and all single losses."""
        for name, value in means.items():
            self.sums[name] = DECAY * self.sums.get(name, 0.0) + (1 - DECAY) * value
