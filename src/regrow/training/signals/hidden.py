"""Block outputs drawn to the teacher's (FitNets; Romero et al., 2015, arXiv:1412.6550).

Shapes: B blocks, T tokens, H hidden channels, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.plan import Plan


@dataclass(frozen=True)
class LayerMap:
    """What the student's residual stream answers to in the teacher's."""

    layers: tuple[tuple[int, int], ...]
    """Pairs of (student block, teacher block) whose outputs are compared."""
    channels: tuple[int, ...] | None = None
    """The teacher's channels that the student has; None for all."""

    @classmethod
    def of(cls, plan: Plan) -> LayerMap:
        """By the plan that the student was cut by.

        A student block answers to the teacher block before the next kept one, so that the next
        block gets what it got in the teacher. The last one is left to the output losses.
        """
        kept = plan.kept_layers()
        layers = tuple((n, following - 1) for n, following in enumerate(kept[1:]))
        return cls(layers, None if plan.hidden is None else tuple(plan.hidden))


@dataclass(frozen=True)
class Hidden:
    """The signal: its weight beside the output losses, and what is compared."""

    weight: float
    map: LayerMap

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask_BT: Tensor) -> Tensor:
        """Σ_tokens mean_blocks |s − t|² / |t|², over the tokens of the mask.

        `student` and `teacher` are `hidden_states` as transformers gives them, each [B, T, H]:
        the embedding first, then each block's output. Relative to each token's own teacher state,
        because a few first tokens are a thousand times larger than the others.
        """
        total = torch.zeros((), device=mask_BT.device)
        for ours, theirs in self.map.layers:
            s_BTH, t_BTH = student[ours + 1], teacher[theirs + 1].to(student[ours + 1].device)
            wide = torch.promote_types(torch.float32, s_BTH.dtype)
            s_BTH, t_BTH = s_BTH.to(wide), t_BTH.to(wide)
            if self.map.channels is not None:
                t_BTH = t_BTH[..., list(self.map.channels)]
            error_BT = (s_BTH - t_BTH).square().sum(-1) / t_BTH.square().sum(-1).clamp_min(1e-12)
            total = total + (error_BT * mask_BT).sum()
        return total / max(1, len(self.map.layers))
