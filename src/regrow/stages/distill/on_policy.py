"""On-policy distillation: which prompts the student continues, and when that is refused."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.config import SourceConfig
from regrow.data.documents import prefix_ids
from regrow.data.prompts import prompts
from regrow.data.sequences import Sequences
from regrow.errors import UserError
from regrow.runtime.batch_generator import BatchGenerator, Sampling
from regrow.runtime.progress import say
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.setup import DistillSetup
from regrow.training import sharding
from regrow.training.on_policy import (
    PROMPTS_AT_ONCE,
    StudentWriter,
    own_rows,
    share_out,
    text_prompts,
)
from regrow.training.shared_tokens import NONE, shared_ids


def check_on_policy(config: DistillConfig, data: DataConfig, options: Options) -> None:
    """Raise UserError where a student cannot write during its training."""
    if not config.on_policy_share:
        return
    shards = sharding.name(options)
    refused = {
        "a cache holds the teacher's outputs for text that exists": config.cache is not None,
        "cross_tokenizer spans compares no single tokens": config.cross_tokenizer != "refuse",
        f"{shards} leaves no process with the whole student": sharding.is_sharded(options),
        "deepspeed is not supported": options.deepspeed is not None,
        "torch_compile would compile the layers for each length": options.torch_compile,
    }
    for reason, given in refused.items():
        if given:
            raise UserError(f"on_policy_share {config.on_policy_share:g}: {reason}: leave one out")
    least = config.on_policy_new_tokens + 2
    if config.on_policy_prompts is None:
        least = config.on_policy_new_tokens + config.on_policy_prompt_tokens + 1
    if data.sequence_length < least:
        raise UserError(
            f"on_policy_new_tokens {config.on_policy_new_tokens}: with its prompt this needs "
            f"{least} tokens, and sequence_length is {data.sequence_length}: change one of them"
        )


def prompt_source(config: DistillConfig) -> SourceConfig | None:
    """The source of the prompts, if the config names one."""
    if config.on_policy_prompts is None or not config.on_policy_share:
        return None
    return SourceConfig(source=config.on_policy_prompts)


def writer_of(
    setup: DistillSetup, student: PreTrainedModel, train: Sequences
) -> StudentWriter | None:
    """The writer of the student's rows of `train`, if there are any.

    Raises UserError if no prompt fits, and for a teacher that lacks tokens of the student.
    """
    config, like, ids_V = setup.config, setup.student.like, setup.teachers.ids_V
    if not config.on_policy_share:
        return None
    if ids_V is not None and bool((ids_V == NONE).any()):
        raise UserError(
            f"on_policy_share {config.on_policy_share:g}: the student may write "
            f"{int((ids_V == NONE).sum())} tokens that the teacher lacks: leave it out"
        )
    tokenizer = like.tokenizer()
    rows = own_rows(len(train), config.on_policy_share)
    asked = _prompts(tokenizer, train, rows, setup.data, config)
    sampling = Sampling(
        config.on_policy_new_tokens,
        config.on_policy_temperature,
        seed=config.seed,
        vocab_size=shared_ids(like, tokenizer),
    )
    return StudentWriter(
        BatchGenerator(student, tokenizer, sampling),
        share_out(asked, rows, setup.data.sequence_length, config.on_policy_new_tokens),
        setup.data.sequence_length,
        len(setup.loss_weights.by_source) - 1,
        config.on_policy_steps,
        PROMPTS_AT_ONCE * setup.options.batch_size,
    )


def _prompts(
    tokenizer: PreTrainedTokenizerBase,
    train: Sequences,
    rows: list[int],
    data: DataConfig,
    config: DistillConfig,
) -> list[list[int]]:
    """The prompts that fit, from their own source or from the training text."""
    new, given = config.on_policy_new_tokens, prompt_source(config)
    if given is None:
        prefix = len(prefix_ids(tokenizer))
        found = text_prompts(train, rows, config.on_policy_prompt_tokens, new, prefix)
    else:
        text = data.model_copy(update={"sources": [given]})
        with_template = bool(tokenizer.chat_template)
        found = [each.ids(tokenizer) for each in prompts(text, "train", with_template)]
    fitting = [ids for ids in found if len(ids) + new <= data.sequence_length]
    if not fitting:
        raise UserError(
            f"on_policy_share {config.on_policy_share:g}: none of {len(found)} prompts has room "
            f"for on_policy_new_tokens {new} in a sequence of {data.sequence_length}: give more "
            "or shorter prompts, or lower on_policy_prompt_tokens"
        )
    if len(fitting) < len(found):
        say(f"distill: {len(found) - len(fitting)} prompts are too long for the student to answer")
    return fitting
