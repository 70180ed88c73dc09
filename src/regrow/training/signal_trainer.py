"""What of the inner signals is trained and kept beside the student: projections and the balance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from regrow.training.signal_mix import SignalMix
from regrow.training.tally import Tally

SIGNAL_STATE = "signals.pt"
"""Beside optimizer.pt in each checkpoint; the student that is written has none of it."""


class SignalTrainer(Trainer):
    """Trainer with a SignalMix: its projections in the optimizer, its state in the checkpoints.

    Their gradients are averaged over the ranks, as DDP does for the student's, and are not clipped.
    """

    def __init__(self, *args: Any, signals: SignalMix | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.signals, self.this_step = signals, Tally()

    def end_step(self) -> None:
        """Before the optimizer's step: what DDP does for the student, for what is outside it."""
        if self.signals is None:
            return
        for projection in self.signals.projections():
            projection.grad = self.accelerator.reduce(projection.grad, "mean")
        if self.signals.balance is not None:
            self.signals.balance.update(self.this_step.means(self.sum_over_ranks))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of each rank's values; the values themselves with one rank."""
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The student's optimizer, with the signals' projections as a group of their own."""
        there = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.signals is not None and self.signals.projections() and not there:
            group = {"params": self.signals.projections(), "weight_decay": 0.0}
            optimizer.add_param_group(group)
            optimizer.register_step_post_hook(self._zero_projections)
        return optimizer

    def _zero_projections(self, *_: Any) -> None:
        """After a step; Trainer does it for the student."""
        assert self.signals is not None
        for projection in self.signals.projections():
            projection.grad = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {} if self.signals is None else self.signals.state_dict()
        if state and self.args.should_save:
            torch.save(state, Path(output_dir) / SIGNAL_STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.signals is not None and self.signals.state_dict():
            state = torch.load(Path(checkpoint) / SIGNAL_STATE, map_location="cpu")
            self.signals.load_state_dict(state)
