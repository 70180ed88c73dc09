"""The text of a distillation, including answers of models, and the losses of each source."""

from __future__ import annotations

from regrow import plugins, stage_dir
from regrow.data.config import DataConfig, SourceConfig
from regrow.data.files import sha256_of
from regrow.data.sources import resolve
from regrow.errors import UserError
from regrow.stages.distill.config import LOSSES, DistillConfig
from regrow.training.loss_weights import LossWeights


def training_text(data: DataConfig, config: DistillConfig) -> DataConfig:
    """The text to train on: `data` or the teacher's answers, plus the student's answers, if any.

    Raises UserError for answers combined with a cache, or with a source that has its own losses.
    """
    sources = data.sources
    if config.cache is not None and (config.answers or config.own_answers):
        raise UserError(
            "a cache is of the data's text, not of generated answers: leave out the cache, or give "
            "the answers as data, also to `regrow cache`"
        )
    if config.answers is not None:
        if any(source.losses is not None for source in sources):
            raise UserError("answers replace the data: leave out the losses of its sources")
        sources = [SourceConfig(source=config.answers)]
    if config.own_answers is not None:
        others = sum(source.weight for source in sources)
        weight = others * config.own_share / (1 - config.own_share)
        own = SourceConfig(source=config.own_answers, weight=weight, losses=config.own_losses)
        sources = [*sources, own]
    return data.model_copy(update={"sources": sources})


def answer_digests(config: DistillConfig) -> dict[str, str]:
    """Hashes of the answers and of the student's prompts; raises UserError for a missing folder."""
    folders = {"answers": config.answers, "own_answers": config.own_answers}
    if config.on_policy_share:
        folders["on_policy_prompts"] = config.on_policy_prompts
    return {
        name: stage_dir.digest([sha256_of(path) for path in resolve(SourceConfig(source=folder))])
        for name, folder in folders.items()
        if folder is not None
    }


def loss_weights_of(config: DistillConfig, data: DataConfig) -> LossWeights:
    """The weighted losses with their options; `data` is the text to train on.

    If the student writes text during its training, the last losses by source are for that text.
    Raises UserError if a source has an unknown loss or a bad weight.
    """
    for source in data.sources:
        try:
            losses = config.losses if source.losses is None else source.losses
            plugins.check_weights(LOSSES, "loss", losses)
        except ValueError as error:
            raise UserError(f"{source.source}: losses: {error}") from None
    by_source = tuple(source.losses or config.losses for source in data.sources)
    tagged = any(source.losses is not None for source in data.sources)
    if config.on_policy_share:
        by_source, tagged = (*by_source, config.on_policy_losses), True
    return LossWeights(
        config.losses,
        config.temperature,
        config.beta,
        config.skew,
        config.exact_head,
        by_source if tagged else (),
    )
