"""The sources of a distillation whose shares follow their excess loss (dynamic_blend)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sequences import Sequences, joined
from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.runtime.progress import say
from regrow.stages.distill.config import DistillConfig
from regrow.training import sharding
from regrow.training.dynamic_blend import BlendedSequences, DynamicBlend, teacher_losses
from regrow.training.objective import AnyTeacher
from regrow.training.teacher import Teacher
from regrow.training.text import text_for
from regrow.training.trainer import TrainedBlend

if TYPE_CHECKING:
    from regrow.stages.distill.setup import DistillSetup


def check_domains(config: DistillConfig, data: DataConfig, options: Options) -> None:
    """Raise UserError where the shares of the sources cannot change during the training."""
    if not config.dynamic_blend:
        if config.reference_losses:
            raise UserError("reference_losses are for dynamic_blend: set it to true")
        return
    sources, given = len(data.sources), len(config.reference_losses)
    if sources < 2:
        raise UserError("dynamic_blend changes the shares of sources: give two sources or more")
    if given not in (0, sources):
        raise UserError(f"{given} reference_losses for {sources} sources: give one for each")
    incompatible = {
        "cache": config.cache is not None,
        "answers": config.answers is not None,
        "own_answers": config.own_answers is not None,
        "on_policy_share": config.on_policy_share > 0,
        "cross_tokenizer spans": config.cross_tokenizer != "refuse",
        "losses of single sources": any(source.losses is not None for source in data.sources),
        sharding.name(options): sharding.is_sharded(options),
    }
    for name, found in incompatible.items():
        if found:
            raise UserError(f"dynamic_blend with {name}: not supported; leave out one of them")
    if config.extra_teachers and not given:
        raise UserError("dynamic_blend with extra_teachers: give reference_losses")


@dataclass(frozen=True)
class Domains:
    """The sequences of each source, and the shares in which they are read."""

    blend: DynamicBlend
    train: BlendedSequences
    heldout: list[Sequences]
    in_step: int
    """Sequences in an optimizer step."""

    @classmethod
    def open(cls, setup: DistillSetup) -> Domains:
        """Read the text of each source; each could fill the whole training.

        Raises UserError for too little text, and for tokens that one of the models lacks.
        """
        data, config, tokenizer = setup.data, setup.config, setup.teachers.tokenizer()
        in_step = config.batch_tokens // data.sequence_length
        total = setup.budget.steps * in_step
        each_heldout = max(1, round(config.heldout_sequences / len(data.sources)))
        train, heldout = [], []
        for source in data.sources:
            alone = data.model_copy(update={"sources": [source]})
            heldout.append(text_for(setup.configs, alone, tokenizer, "validation", each_heldout))
            train.append(text_for(setup.configs, alone, tokenizer, "train", total))
            setup.teachers.check(heldout[-1], train[-1])
        weights = [source.weight for source in data.sources]
        blend = DynamicBlend(_names(data), weights, config.reference_losses)
        return cls(blend, BlendedSequences(train, blend, total), heldout, in_step)

    def all_heldout(self) -> Sequences:
        """The validation sequences of all sources."""
        return joined(self.heldout)

    def trained(self, teacher: AnyTeacher, batch_size: int) -> TrainedBlend:
        """The blend for the trainer; measures the teacher's losses if none were given."""
        if not self.blend.references:
            assert isinstance(teacher, Teacher)
            measured = teacher_losses(teacher, self.heldout, batch_size)
            # One process's figures for all, because GPUs may differ in the last bits.
            self.blend.references = distributed.gathered(measured)[0]
        named = zip(self.blend.names, self.blend.references, strict=True)
        say("distill: reference losses: " + ", ".join(f"{name} {loss:.3f}" for name, loss in named))
        return TrainedBlend(self.blend, self.heldout, self.in_step)


def _names(data: DataConfig) -> list[str]:
    """A short name for each source: its file's name, with a number if two have the same."""
    names = [Path(source.source).name.split(".")[0] for source in data.sources]
    return [
        name if names.count(name) == 1 else f"{name} {number}"
        for number, name in enumerate(names, start=1)
    ]
