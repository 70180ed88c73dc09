"""All that a student is taught by, opened and checked before any slow work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.data import Blocks, DataConfig
from regrow.errors import UserError
from regrow.options import Options
from regrow.stages.distill.across import aligner_of, say_coverage
from regrow.stages.distill.blend import Further, open_blend
from regrow.stages.distill.cached import open_cache
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.student import Student
from regrow.stages.distill.teaching import blended, teacher_of
from regrow.training.cache.folder import Cache
from regrow.training.callbacks import CHOSEN_BY, SPAN_CHOSEN_BY
from regrow.training.holding import Hold
from regrow.training.objective import AnyTeacher
from regrow.training.spans.align import Aligner
from regrow.training.spans.teacher import SpanTeacher
from regrow.training.teacher import Teacher
from regrow.training.tokens import check_text, teacher_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Opposite:
    """The teacher, and how its tokens answer to the student's."""

    pupil: Student
    master: Checkpoint
    ids_V: Tensor | None = None
    """The teacher's ids of the student's tokens; None for the same ones."""
    cached: Cache | None = None
    """What the teacher's body is replaced by."""
    further: list[Further] = field(default_factory=list)
    """Teachers beside the first."""
    aligner: Aligner | None = None
    """For a teacher of another tokenizer."""

    @classmethod
    def open(
        cls,
        config: DistillConfig,
        pupil: Student,
        master: Checkpoint,
        options: Options,
        text: DataConfig,
    ) -> Opposite:
        """Raises UserError when this teacher cannot teach this student on `text` as is asked."""
        aligner = aligner_of(config, pupil.like, master, options)
        if aligner is not None and any(source.losses is not None for source in text.sources):
            raise UserError(
                "cross_tokenizer spans: all text takes the same losses: leave out own_answers, and "
                "the losses of sources"
            )
        if aligner is not None:
            return cls(pupil, master, aligner=aligner)
        ids_V = teacher_ids(pupil.like, master)
        further = open_blend(config, pupil.like, ids_V)
        return cls(pupil, master, ids_V, open_cache(config, master, ids_V, text), further)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All teachers."""
        return [self.master, *(each.checkpoint for each in self.further)]

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what decides the result."""
        first, *others = self.checkpoints
        found = {"teacher": first.fingerprint}
        if self.cached is not None:
            found["cache"] = self.cached.fingerprint
        return found | {f"teacher {n}": other.fingerprint for n, other in enumerate(others, 2)}

    @property
    def chosen_by(self) -> str:
        """The held-out loss by which the best student is chosen."""
        return CHOSEN_BY if self.aligner is None else SPAN_CHOSEN_BY

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What the text is tokenized by: the student's; the teacher's where tokens are the same."""
        same = self.ids_V is None and self.aligner is None
        return (self.master if same else self.pupil.like).tokenizer()

    def check(self, heldout: Blocks, train: Blocks) -> None:
        """Raise UserError for text that one of the models cannot read, or a cache has not."""
        tokenizer, ours = self.tokenizer(), self.pupil.vocab_size
        for split, blocks in {"heldout": heldout, "train": train}.items():
            if self.aligner is not None:
                check_text(blocks, tokenizer, (ours, ours), None)
                self.aligner.check_specials(blocks)
                continue
            for one in (Further(self.master, 1.0, self.ids_V), *self.further):
                rows = ours, int(one.checkpoint.config["vocab_size"])
                check_text(blocks, tokenizer, rows, one.ids_V)
            if self.cached is not None:
                self.cached.check_blocks(blocks, split)
        if self.aligner is not None:
            say_coverage(self.aligner, heldout)

    def teacher(self, config: DistillConfig, device: torch.device, hold: Hold) -> AnyTeacher:
        """What stands opposite the student in training."""
        found = teacher_of(self.master, self.ids_V, self.cached, device, hold)
        if self.aligner is not None:
            assert isinstance(found, Teacher)
            return SpanTeacher(found, self.aligner, config.span_temperature)
        return blended(found, self.further, hold)
