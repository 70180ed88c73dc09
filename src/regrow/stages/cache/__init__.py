"""Cache: run a teacher once over the text of later distillations, and store its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from pydantic import Field, model_validator
from tyro.conf import OmitArgPrefixes, Positional

from regrow.config import Config, Machine
from regrow.data.config import DataConfig
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Text, open_model, print_lines

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint


OPTIONS_OF = {"samples": ("draws", "sampling"), "topk": ("k", "bits"), "hidden": ("dtype",)}
"""The fields that only one format reads, by format."""


class CacheConfig(Config):
    """Size and format of a cache."""

    tokens: int = Field(default=1_000_000, ge=1)
    """Training tokens to cache. A larger number later extends a finished cache. If a recipe omits
    it, it is the number of tokens that the distillations of this teacher use."""
    heldout_sequences: int = Field(default=16, ge=1)
    """Held-out sequences, which are always stored exactly. If a recipe omits it, it is the number
    that the distillations of this teacher use."""
    format: Literal["samples", "topk", "hidden"] = "samples"
    """samples: unbiased draws of ids. topk: the most likely ids and the mass of all others. hidden:
    the last hidden state, which is exact and supports every loss on the output."""
    k: int = Field(default=18, ge=1)
    """topk: number of ids."""
    bits: int = Field(default=8, ge=2, le=16)
    """topk: bits per probability."""
    draws: int = Field(default=40, ge=1, le=255)
    """samples: number of draws for each token."""
    sampling: Literal["systematic", "multinomial"] = "systematic"
    """samples: draws are evenly spaced in the cumulative distribution (systematic) or independent
    (multinomial), which adds noise."""
    dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """hidden: bfloat16 is exact, int8 takes half the space."""
    seed: int = 0
    """samples: seed of the draws."""

    @model_validator(mode="after")
    def _options_are_of_the_format(self) -> CacheConfig:
        for kind, names in OPTIONS_OF.items():
            for name in names:
                changed = getattr(self, name) != type(self).model_fields[name].default
                if kind != self.format and changed:
                    raise ValueError(
                        f"{name} is of format {kind}, this is {self.format}: give that format, or "
                        f"leave out {name}"
                    )
        return self


class CacheStage(Stage):
    """Caches the outputs of a teacher for later distillations."""

    config = CacheConfig
    takes_teacher = True
    ranks = "split"
    reads = ("validation", "train")

    def command(
        self,
        teacher: Annotated[Positional[str], tyro.conf.arg(metavar="TEACHER")],
        text: OmitArgPrefixes[Text],
        out: Path,
        caching: OmitArgPrefixes[CacheConfig] = CacheConfig(),
        machine: OmitArgPrefixes[Machine] = Machine(),
        dry_run: bool = False,
    ) -> None:
        """Run a teacher once over the text of later distillations, and store its outputs.

        Args:
            teacher: Hugging Face folder, hub id, GGUF file, or package:NAME.
            out: Folder to write the cache to; a finished cache is extended.
            caching: How much to store, and in which format.
            machine: Device and batch size.
            dry_run: Check everything and print what would be done.
        """
        checkpoint, data = open_model(teacher), text.blend()
        if dry_run:
            print_lines(estimate(checkpoint, data, caching), out)
            return
        from regrow.stages.cache.stage import cache

        cache(checkpoint, data, out, caching, machine.options())

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError if the teacher, the text or the format does not allow a cache."""
        from regrow.stages.cache.stage import header_of

        header_of(_teacher(step, plan), plan.data, step.config)

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """The estimated tokens, disk space and time."""
        config = fitted(step, plan.steps, plan.model)
        return estimate(_teacher(step, plan), plan.data, config)

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """Record in the plan that a cache of this teacher exists."""
        plan.caches[step.teacher or plan.model] = step.config.format

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Cache the teacher."""
        from regrow.stages.cache.stage import cache

        teacher, config = step.teacher or run.model, fitted(step, run.steps, run.model)
        run.caches[teacher] = cache(teacher, run.data, run.folder(folder), config, run.options)


def _teacher(step: Step, plan: RecipePlan) -> Checkpoint:
    from regrow.checkpoint import load

    return plan.checkpoint if step.teacher is None else load(step.teacher)


def fitted(step: Step, steps: list[Step], model: str) -> CacheConfig:
    """The stage's config, where omitted fields are set from the distillations that follow.

    `tokens` and `heldout_sequences` are then those of the largest later distillation with the same
    teacher; `model` is the recipe's model.
    """
    config: CacheConfig = step.config
    needs: list[dict[str, int]] = [
        later.stage.needs_of_cache(later)
        for later in steps[steps.index(step) + 1 :]
        if (later.teacher or model) == (step.teacher or model)
    ]
    largest: dict[str, int] = {}
    for need in needs:
        for name, value in need.items():
            largest[name] = max(value, largest.get(name, 0))
    given = config.model_fields_set
    return config.model_copy(update={k: v for k, v in largest.items() if k not in given})


def estimate(teacher: Checkpoint, data: DataConfig, config: CacheConfig) -> list[str]:
    """The estimated tokens, disk space and time of a cache: one pass, 2 N operations per token."""
    from regrow.cost import forward_seconds
    from regrow.runtime.progress import clock
    from regrow.stages.cache.stage import header_of

    form = header_of(teacher, data, config).formats()["train"]
    heldout = config.heldout_sequences * data.sequence_length
    seconds = forward_seconds(teacher, config.tokens + heldout)
    size = config.tokens * form.bytes_per_token()
    return [
        f"cache: {config.format}, {config.tokens:,} tokens to train on and {heldout:,} held out",
        f"  disk at most {size / 1e9:.2f} GB ({form.bytes_per_token():,.0f} bytes per token), time "
        f"at best {clock(seconds)}",
    ]


STAGE = CacheStage()
