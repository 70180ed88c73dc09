"""Student, teacher and text of a distillation, opened and checked before any slow work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regrow import families
from regrow.data import Blocks, DataConfig, build_blocks
from regrow.options import Options
from regrow.quantization.schemes import Scheme
from regrow.stages.distill.budget import Budget, budget_of
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.opposite import Opposite
from regrow.stages.distill.rounding import rounding_of
from regrow.stages.distill.signals import signals_between
from regrow.stages.distill.student import Student, check_student
from regrow.stages.distill.teaching import hold_of
from regrow.training import sharding
from regrow.training.adapters import Adapter
from regrow.training.holding import Hold
from regrow.training.mix import Mix
from regrow.training.signal_mix import SignalMix


@dataclass(frozen=True)
class Lesson:
    """Who is taught by whom, by what losses, in what way."""

    pupil: Student
    opposite: Opposite
    mix: Mix
    signals: SignalMix | None
    adapter: Adapter | None
    rounding: Scheme | None
    budget: Budget
    hold: Hold
    config: DistillConfig
    options: Options

    @classmethod
    def of(
        cls,
        pupil: Student,
        opposite: Opposite,
        mix: Mix,
        data: DataConfig,
        config: DistillConfig,
        options: Options,
    ) -> Lesson:
        """Raises UserError for what this student, its teacher and `config` cannot do together."""
        hold = hold_of(config, options)
        if hold == "disk":  # block by block, by the family's table
            for each in opposite.checkpoints:
                families.of(each)
        signals = signals_between(pupil, opposite.master, config)
        adapter = check_student(pupil, config, options)
        rounding = rounding_of(pupil, config, sharding.is_sharded(options))
        budget = budget_of(config, data, options)
        return cls(pupil, opposite, mix, signals, adapter, rounding, budget, hold, config, options)

    @property
    def sharded(self) -> bool:
        """Whether the ranks share the weights out among them."""
        return sharding.is_sharded(self.options)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are written: those of a grid are exact in float32 alone."""
        return self.pupil.dtype if self.rounding is None else torch.float32

    def bytes(self) -> int:
        """What the run needs on disk: the best, the last and the next checkpoint, and its result.

        A checkpoint has weights and the optimizer's two moments in float32.
        """
        pupil, adapter = self.pupil, self.adapter
        trained = pupil.parameters if adapter is None else adapter.parameters(pupil.on_meta())
        each = 16 if self.sharded else 12  # in shares the weights are written twice
        return trained * 3 * each + pupil.parameters * self.dtype.itemsize

    def blocks(self, data: DataConfig, text: DataConfig) -> tuple[Blocks, Blocks]:
        """Those to train on, of `text`, and the held-out ones of `data`.

        Raises UserError for too little text, and for text that one of the models cannot read.
        """
        tokenizer = self.opposite.tokenizer()
        heldout = build_blocks(data, tokenizer, "heldout", self.config.heldout_blocks)
        count = self.budget.steps * self.config.batch_tokens // data.sequence_length
        train = build_blocks(text, tokenizer, "train", count)
        self.opposite.check(heldout, train)
        return train, heldout
