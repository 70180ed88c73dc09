"""The output losses that a config asks for, for all text or for each source of it."""

from __future__ import annotations

from regrow.data.config import DataConfig
from regrow.errors import UserError
from regrow.stages.distill.config import DistillConfig, known_losses
from regrow.training.mix import Mix


def mix_of(config: DistillConfig, data: DataConfig) -> Mix:
    """The weighted losses with their options; `data` is the text that is trained on.

    Raises UserError for losses of a source that cannot be.
    """
    for source in data.sources:
        try:
            known_losses(config.losses if source.losses is None else source.losses)
        except ValueError as error:
            raise UserError(f"{source.source}: losses: {error}") from None
    given = [source.losses for source in data.sources]
    each = tuple(config.losses if losses is None else losses for losses in given)
    tagged = any(losses is not None for losses in given)
    return Mix(
        config.losses,
        config.temperature,
        config.beta,
        config.skew,
        config.exact_head,
        each if tagged else (),
    )
