"""The text of a distillation that models wrote: the teacher's answers, and the student's own."""

from __future__ import annotations

from regrow import manifest
from regrow.data.config import DataConfig, SourceConfig
from regrow.data.files import sha256_of
from regrow.data.sources import resolve
from regrow.errors import UserError
from regrow.stages.distill.config import DistillConfig


def text_of(data: DataConfig, config: DistillConfig) -> DataConfig:
    """The text to train on: the teacher's answers in place of `data`, the student's own beside it.

    Raises UserError where that cannot be.
    """
    sources = data.sources
    if config.cache is not None and (config.answers or config.own_answers):
        raise UserError(
            "a cache is of the data's text, not of generated answers: leave out the cache, or give "
            "the answers as data, to `regrow cache` too"
        )
    if config.answers is not None:
        if any(source.losses is not None for source in sources):
            raise UserError(
                "answers take the place of the data: leave out the losses of its sources"
            )
        sources = [SourceConfig(source=config.answers)]
    if config.own_answers is not None:
        others = sum(source.weight for source in sources)
        weight = others * config.own_share / (1 - config.own_share)
        own = SourceConfig(source=config.own_answers, weight=weight, losses=config.own_losses)
        sources = [*sources, own]
    return data.model_copy(update={"sources": sources})


def digests_of(config: DistillConfig) -> dict[str, str]:
    """Of the answers' content; raises UserError for a folder that is not there."""
    given = {"answers": config.answers, "own_answers": config.own_answers}
    return {
        name: manifest.digest([sha256_of(path) for path in resolve(SourceConfig(source=folder))])
        for name, folder in given.items()
        if folder is not None
    }
