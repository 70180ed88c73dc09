"""Rotate: make the principal directions of the residual stream the model's channels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from tyro.conf import OmitArgPrefixes

from regrow.config import Config, Machine
from regrow.data.config import DataConfig
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, Text, open_model, print_lines

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint

ADVICE = "rotate before you sparsify"


class RotateConfig(Config):
    """The amount of text from which the principal directions are computed."""

    samples: int = Field(default=96, ge=1)
    """Number of calibration sequences to run through the model."""


class RotateStage(Stage):
    """Replaces the current model by a rotated one."""

    config = RotateConfig
    changes_weights = True
    reads = ("calibration",)

    def command(
        self,
        model: Model,
        text: OmitArgPrefixes[Text],
        out: Path,
        rotation: OmitArgPrefixes[RotateConfig] = RotateConfig(),
        machine: OmitArgPrefixes[Machine] = Machine(),
        dry_run: bool = False,
    ) -> None:
        """Rotate the residual stream, so that a later cut of its channels (hidden) loses less.

        Args:
            model: Hugging Face folder, hub id, GGUF file, or package:NAME.
            out: Folder to write the rotated model to.
            rotation: Amount of calibration text.
            machine: Device and batch size.
            dry_run: Check everything and print what would be done.
        """
        from regrow.sparsity.zeros import refuse_filling

        checkpoint, data = open_model(model), text.blend()
        if dry_run:
            refuse_filling(checkpoint, "a rotation", ADVICE)
            print_lines(estimate(checkpoint, data, rotation), out)
            return
        from regrow.stages.rotate.stage import rotate

        rotate(checkpoint, data, out, rotation, machine.options())

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for a family that cannot be rotated."""
        from regrow import families
        from regrow.sparsity.zeros import NOTE, would_fill
        from regrow.stages.rotate.basis import check

        check(families.of(plan.checkpoint))
        if NOTE in plan.left:
            raise would_fill(plan.left[NOTE], "a rotation", ADVICE)

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """The tokens, parameters and time of the step."""
        return estimate(plan.checkpoint, plan.data, step.config)

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Rotate the current model."""
        from regrow.stages.rotate.stage import rotate

        rotate(run.current, run.data, run.folder(folder), step.config, run.options)
        run.add("rotated", run.folder(folder))


def estimate(checkpoint: Checkpoint, data: DataConfig, config: RotateConfig) -> list[str]:
    """The tokens, parameters and time of a rotation."""
    from regrow import families
    from regrow.cost import forward_seconds
    from regrow.runtime.progress import clock
    from regrow.stages.rotate.basis import check, rotated_config

    family = families.of(checkpoint)
    check(family)
    tokens = config.samples * data.sequence_length
    seconds = forward_seconds(checkpoint, tokens)
    before, after = (
        family.count(c) for c in (checkpoint.config, rotated_config(checkpoint.config))
    )
    return [
        f"rotate: {config.samples} sequences of {data.sequence_length} = {tokens:,} tokens, time "
        f"about {clock(seconds)}; {before:,} parameters now, then {after:,}",
    ]


STAGE = RotateStage()
