"""Profile: measure on calibration text how much each unit of a model matters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes

from regrow.config import Options
from regrow.data.config import DataConfig
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, Text, open_model, print_lines
from regrow.stages.profile.config import ProfileConfig

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint


class ProfileStage(Stage):
    """Takes the current model; leaves its profile, for the prunes that follow."""

    config = ProfileConfig
    needs_plain_weights = True
    reads = ("calibration",)

    def command(
        self,
        model: Model,
        text: OmitArgPrefixes[Text],
        out: Path,
        profiling: OmitArgPrefixes[ProfileConfig] = ProfileConfig(),
        machine: OmitArgPrefixes[Options] = Options(),
        dry_run: bool = False,
    ) -> None:
        """Measure on calibration text how much each unit of a model matters.

        Args:
            model: Hugging Face folder, hub id, GGUF file, or package:NAME.
            out: Folder to write the profile to.
            profiling: What to measure, on how much text.
            machine: Device and batch size.
            dry_run: Check everything and print what would be done.
        """
        checkpoint, data = open_model(model), text.blend()
        if dry_run:
            print_lines(estimate(checkpoint, data, profiling), out)
            return
        from regrow.stages.profile.stage import profile

        profile(checkpoint, data, out, profiling, machine)

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for an unknown criterion or one that this config does not measure."""
        from regrow.stages.profile.scoring import statistics_needed

        statistics_needed(step.config)

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """Tokens, passes, disk and time."""
        return estimate(plan.checkpoint, plan.data, step.config)

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """There is a profile of the current model."""
        plan.profiled = True
        if not plan.calibration_sequences:
            plan.calibration_sequences = step.config.samples

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Profile the current model."""
        from regrow.stages.profile.stage import profile

        profile(run.current, run.data, run.folder(folder), step.config, run.options)
        run.profile = run.folder(folder)


def estimate(checkpoint: Checkpoint, data: DataConfig, config: ProfileConfig) -> list[str]:
    """Tokens, passes, disk and time of a profile."""
    from regrow.cost import BACKWARD, FORWARD, forward_seconds
    from regrow.runtime.progress import clock
    from regrow.stages.profile.collect import GRADIENTS, REMOVALS
    from regrow.stages.profile.passes import passes_for
    from regrow.stages.profile.scoring import statistics_needed
    from regrow.stages.profile.stage import estimate_bytes

    needs = set[str]().union(*statistics_needed(config).values())
    tokens = config.samples * data.sequence_length
    passes = 1 + (BACKWARD["frozen"] / FORWARD if needs & GRADIENTS else 0)
    read = passes * tokens
    removals = len(needs & REMOVALS.keys()) * passes_for(checkpoint.config["num_hidden_layers"])
    read += removals * min(config.removal_sequences, config.samples) * data.sequence_length
    seconds = forward_seconds(checkpoint, read)
    grams = min(config.gram_tokens, tokens)
    return [
        f"profile: {config.samples} sequences of {data.sequence_length} = {tokens:,} tokens, "
        f"Gram matrices of {', '.join(config.grams)} on {grams:,} of them",
        f"  disk {estimate_bytes(checkpoint, config) / 1e9:.2f} GB, time about {clock(seconds)} "
        "for the passes through the model, and the Gram matrices on top",
    ]


STAGE = ProfileStage()
