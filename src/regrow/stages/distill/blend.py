"""The further teachers of a blend, checked before any slow work."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.errors import UserError
from regrow.stages.distill.config import DistillConfig
from regrow.training.tokens import NONE, teacher_ids


@dataclass(frozen=True)
class Further:
    """A teacher beside the first one."""

    checkpoint: Checkpoint
    share: float
    ids_V: Tensor | None


def check_blend(config: DistillConfig) -> None:
    """Raise UserError for what needs a single teacher."""
    if not config.blend:
        return
    for what in ("cache", "signals"):
        if getattr(config, what):
            raise UserError(
                f"blend: {what} is of one teacher alone; leave out {what}, or the further teachers"
            )


def open_blend(
    config: DistillConfig, student: Checkpoint, ids_V: Tensor | None = None
) -> list[Further]:
    """The further teachers with their ids of the student's tokens; `ids_V` are the first one's.

    Raises UserError for one that cannot be opened, or lacks a token of the student.
    """
    check_blend(config)
    found = []
    for name, share in config.blend.items():
        checkpoint = load(name)
        families.of(checkpoint)
        ids = teacher_ids(student, checkpoint)
        found.append(Further(checkpoint, share, ids))
    for ids in [ids_V, *(each.ids_V for each in found)] if found else []:
        if ids is not None and bool((ids == NONE).any()):
            raise UserError(
                f"blend: every teacher must have all tokens of the student {student.folder}, and "
                f"one lacks {int((ids == NONE).sum())}; leave out the further teachers"
            )
    return found
