"""The cache that a distillation takes in its teacher's place, checked before any slow work."""

from __future__ import annotations

from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.data.config import DataConfig
from regrow.errors import UserError
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.mix import mix_of
from regrow.training.cache.folder import Cache
from regrow.training.cache.teacher import check_use

FEWER_TOKENS = (
    "a cache is of the teacher's own tokens, and the student has fewer, or others: leave out the "
    "cache, so that the live teacher is used"
)


def open_cache(
    config: DistillConfig, master: Checkpoint, ids_V: Tensor | None, text: DataConfig
) -> Cache | None:
    """The cache that the config names, if any; `text` is what is trained on.

    Raises UserError when it is of another teacher, or cannot teach this student in this way.
    """
    if config.cache is None:
        return None
    if ids_V is not None:
        raise UserError(FEWER_TOKENS)
    cache = Cache(config.cache)
    cache.check_teacher(master)
    check_loss(config, cache.header.format, text)
    return cache


def check_loss(config: DistillConfig, format: str, text: DataConfig) -> None:
    """Raise UserError for a loss that a cache of this format cannot teach."""
    check_use(format, mix_of(config, text), needs_layers=bool(config.signals))
