"""Profile: measure on calibration text how much each unit of a model matters."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from tyro.conf import OmitArgPrefixes

from regrow.config import Config, ProfileMachine
from regrow.data.config import DataConfig
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, Text, open_model, print_lines

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint


GRAM_TOKENS = 65536


class ProfileConfig(Config):
    """The importance criteria to compute, and the amount of calibration text."""

    criteria: tuple[str, ...] = ("activation_l2", "block_influence", "token_count")
    """Importance criteria to compute: names of files in profile/importance."""
    samples: int = Field(default=1024, ge=1)
    """Number of calibration sequences to run through the model."""
    gram_tokens: int | None = Field(default=None, ge=0)
    """Number of calibration tokens for Gram matrices, which only the criterion obs and the repair
    method gram read. None: 65,536 if a criterion or a later prune of the recipe reads them,
    otherwise 0."""
    grams: tuple[Literal["mlp", "heads"], ...] = ("mlp", "heads")
    """Dimensions for which Gram matrices are computed: those that will be cut."""
    token_weight: Literal["inverse_residual", "uniform"] = "inverse_residual"
    """Weight of a token in the Gram matrices: 1/|residual|², which measures the error as it counts
    after the next norm (inverse_residual), or the same weight for all tokens (uniform)."""
    vocab_tokens: int = Field(default=2_000_000, ge=1)
    """Number of calibration tokens to count for the vocabulary (token_count), at most the whole
    split; they are tokenized, but not run through the model."""
    removal_sequences: int = Field(default=4, ge=1)
    """Number of sequences for removing layers one by one (kl_drop, perplexity_drop)."""
    seed: int = 0
    """Seed of the random criterion."""

    def resolved(self, read_later: bool = False) -> ProfileConfig:
        """The config with `gram_tokens` as a number; `read_later`: a later prune needs them."""
        if self.gram_tokens is not None:
            return self
        from regrow.stages.profile.importance import reads_grams

        tokens = GRAM_TOKENS if read_later or reads_grams(self) else 0
        return self.model_copy(update={"gram_tokens": tokens})


class ProfileStage(Stage):
    """Measures the current model, and stores its profile for the following prunes."""

    config = ProfileConfig
    needs_plain_weights = True
    reads = ("calibration",)
    ranks = "split"
    less_memory = "lower --batch-size, or give --order layer"

    def command(
        self,
        model: Model,
        text: OmitArgPrefixes[Text],
        out: Path,
        profiling: OmitArgPrefixes[ProfileConfig] = ProfileConfig(),
        machine: OmitArgPrefixes[ProfileMachine] = ProfileMachine(),
        dry_run: bool = False,
    ) -> None:
        """Measure on calibration text how much each unit of a model matters.

        Args:
            model: Hugging Face folder, hub id, GGUF file, or package:NAME.
            out: Folder to write the profile to.
            profiling: Criteria to compute, and amount of text.
            machine: Device and batch size.
            dry_run: Check everything and print what would be done.
        """
        checkpoint, data = open_model(model), text.blend()
        if dry_run:
            print_lines(estimate(checkpoint, data, profiling), out)
            return
        from regrow.stages.profile.stage import profile

        profile(checkpoint, data, out, profiling, machine.options())

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for an unknown criterion, or one whose statistics are not collected."""
        from regrow.stages.profile.importance import statistics_needed

        statistics_needed(_resolved(step, plan.steps))

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """The tokens, passes, disk space and time that the step needs."""
        return estimate(plan.checkpoint, plan.data, _resolved(step, plan.steps))

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """Record that the current model has a profile, with or without Gram matrices."""
        gram_tokens = _resolved(step, plan.steps).gram_tokens
        plan.note_profile(step.config.criteria, step.config.samples, gram_tokens)

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Profile the current model."""
        from regrow.stages.profile.stage import profile

        config = _resolved(step, run.steps)
        profile(run.current, run.data, run.folder(folder), config, run.options)
        run.profile = run.folder(folder)


def _resolved(step: Step, steps: list[Step]) -> ProfileConfig:
    """The step's config, with Gram matrices if a prune before the next profile reads them."""
    from regrow.pruning.repair import reads_grams

    assert isinstance(step.config, ProfileConfig)
    number = next(n for n, each in enumerate(steps) if each is step)
    followers = takewhile(lambda each: each.name != step.name, steps[number + 1 :])
    pruned = [each.config for each in followers if each.name == "prune"]
    return step.config.resolved(any(reads_grams(config) for config in pruned))


def estimate(checkpoint: Checkpoint, data: DataConfig, config: ProfileConfig) -> list[str]:
    """The tokens, passes, disk space and time that a profile needs."""
    from regrow.cost import BACKWARD, FORWARD, forward_seconds
    from regrow.runtime.progress import clock
    from regrow.stages.profile.importance import GRADIENTS, REMOVALS, statistics_needed
    from regrow.stages.profile.passes import passes_for
    from regrow.stages.profile.stage import estimate_bytes

    config = config.resolved()
    needs = set[str]().union(*statistics_needed(config).values())
    tokens = config.samples * data.sequence_length
    passes = 1 + (BACKWARD["frozen"] / FORWARD if needs & GRADIENTS else 0)
    read = passes * tokens
    removals = len(needs & REMOVALS.keys()) * passes_for(checkpoint.config["num_hidden_layers"])
    read += removals * min(config.removal_sequences, config.samples) * data.sequence_length
    seconds = forward_seconds(checkpoint, read)
    lines = [
        f"profile: {config.samples} sequences of {data.sequence_length} = {tokens:,} tokens, time "
        f"about {clock(seconds)} for the passes through the model"
    ]
    if grams := min(config.gram_tokens or 0, tokens):
        lines.append(
            f"  Gram matrices of {', '.join(config.grams)} on {grams:,} of them: disk "
            f"{estimate_bytes(checkpoint, config) / 1e9:.2f} GB, and about as much time again"
        )
    return lines


STAGE = ProfileStage()
