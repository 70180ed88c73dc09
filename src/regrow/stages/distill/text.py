"""The text of a distillation, answers of models among it, and the output losses on each source."""

from __future__ import annotations

from regrow import stage_dir
from regrow.data.config import DataConfig, SourceConfig
from regrow.data.files import sha256_of
from regrow.data.sources import resolve
from regrow.errors import UserError
from regrow.stages.distill.config import DistillConfig, known_losses
from regrow.training.loss_weights import LossWeights


def training_text(data: DataConfig, config: DistillConfig) -> DataConfig:
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


def answer_digests(config: DistillConfig) -> dict[str, str]:
    """Of the answers' content; raises UserError for a folder that is not there."""
    given = {"answers": config.answers, "own_answers": config.own_answers}
    return {
        name: stage_dir.digest([sha256_of(path) for path in resolve(SourceConfig(source=folder))])
        for name, folder in given.items()
        if folder is not None
    }


def loss_weights_of(config: DistillConfig, data: DataConfig) -> LossWeights:
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
    return LossWeights(
        config.losses,
        config.temperature,
        config.beta,
        config.skew,
        config.exact_head,
        each if tagged else (),
    )
