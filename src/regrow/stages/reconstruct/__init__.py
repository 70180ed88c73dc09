"""Reconstruct: train a cut model layer after layer towards its teacher's residual stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import Field
from tyro.conf import OmitArgPrefixes, Positional

from regrow.config import Config, ReconstructMachine
from regrow.data.config import DataConfig
from regrow.errors import UserError
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Text, open_model, print_lines

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint

USUAL_TOKENS = 512
"""Tokens per optimizer step, unless the config says otherwise."""


class ReconstructConfig(Config):
    """How much text each layer is trained on, and at which rates."""

    tokens: int = Field(default=98_304, ge=1)
    """Tokens of training text that each layer is trained on."""
    passes: int = Field(default=2, ge=1)
    """How often each layer sees that text."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per optimizer step, a multiple of the sequence length; by default as many whole
    sequences as 512 tokens hold, and at least one."""
    learning_rate: float = Field(default=0.01, gt=0)
    """Peak learning rate of AdamW for the matrices of MLPs and experts, as a share of the root mean
    square of each matrix."""
    attention_rate: float = Field(default=0.1, ge=0)
    """Learning rate of attention and norms, as a share of the rate for MLPs; 0 leaves them as they
    are. At the full rate the errors grow from layer to layer, until the model is worse than
    before."""
    beta2: float = Field(default=0.99, gt=0, lt=1)
    """AdamW's second-moment decay."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of a layer's steps in which the learning rate rises; then it falls linearly to zero."""
    validation_sequences: int = Field(default=8, ge=1)
    """Sequences of the validation split by which a layer, and the model, is accepted."""
    checks: int = Field(default=4, ge=1)
    """How often the whole model is checked on the way. At the end, the layers after the check with
    the lowest KL get their old weights back."""
    seed: int = 0
    """Seed of the order of the text."""

    def sequences_in_step(self, sequence_length: int) -> int:
        """Sequences per optimizer step; raises UserError unless they are whole ones."""
        if self.batch_tokens is None:
            return max(1, USUAL_TOKENS // sequence_length)
        if self.batch_tokens % sequence_length:
            raise UserError(
                f"batch_tokens {self.batch_tokens} is no multiple of the sequence_length "
                f"{sequence_length}: change one of them, or leave batch_tokens out"
            )
        return self.batch_tokens // sequence_length


class ReconstructStage(Stage):
    """Takes the current model and the teacher that it was cut from; leaves it reconstructed."""

    config = ReconstructConfig
    takes_teacher = True
    changes_weights = True
    needs_plain_weights = True
    reads = ("train", "validation")

    def command(  # type: ignore[override]
        self,
        student: Annotated[Positional[str], tyro.conf.arg(metavar="STUDENT")],
        teacher: str,
        text: OmitArgPrefixes[Text],
        out: Path,
        training: OmitArgPrefixes[ReconstructConfig] = ReconstructConfig(),
        machine: OmitArgPrefixes[ReconstructMachine] = ReconstructMachine(),
        dry_run: bool = False,
    ) -> None:
        """Train a cut model layer after layer towards its teacher's residual stream.

        Args:
            student: A model that regrow prune wrote.
            teacher: The model that it was cut from.
            out: Folder to write the reconstructed model to.
            training: How much text each layer is trained on, and at which rates.
            machine: Device, batch size and compilation.
            dry_run: Check everything and print what would be done.
        """
        from regrow.stages.reconstruct.stage import plan_between, reconstruct
        from regrow.training.compile import require_compiler

        cut, known, data = open_model(student), open_model(teacher), text.blend()
        if dry_run:
            require_compiler(machine)
            plan_between(cut, known)
            print_lines(estimate(cut, known, data, training), out)
            return
        reconstruct(cut, known, data, out, training, machine.options())

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for no prune before it, no whole sequences in a step, or no compiler."""
        from regrow.training.compile import require_compiler

        require_compiler(plan.options)
        step.config.sequences_in_step(plan.data.sequence_length)
        steps = plan.steps[: plan.steps.index(step)]
        if not any(each.name == "prune" for each in steps):
            raise UserError("there is nothing to reconstruct: put a prune stage before it")

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """Steps and time, for a model of the size that it will have by then."""
        return lines(plan.parameters, plan.checkpoint, plan.data, step.config)

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Reconstruct the current model."""
        from regrow.stages.reconstruct.stage import reconstruct

        given = (run.current, step.teacher or run.model, run.data, run.folder(folder))
        reconstruct(*given, step.config, run.options)
        run.add("reconstructed", run.folder(folder))


def estimate(
    student: Checkpoint, teacher: Checkpoint, data: DataConfig, config: ReconstructConfig
) -> list[str]:
    """Steps and time of a reconstruction."""
    from regrow.cost import parameters

    return lines(parameters(student), teacher, data, config)


def lines(
    student: int, teacher: Checkpoint, data: DataConfig, config: ReconstructConfig
) -> list[str]:
    """As `estimate`, for a student of so many parameters, which need not be there yet.

    Operations: 6 N for each trained token, 2 N for each pass of either stream over the text.
    """
    from regrow.cost import matmul_rate, parameters
    from regrow.runtime.progress import clock

    tokens = config.tokens * config.passes
    in_step = config.sequences_in_step(data.sequence_length) * data.sequence_length
    operations = (6 * config.passes + 4) * student + 2 * parameters(teacher)
    layers = int(teacher.config["num_hidden_layers"])
    return [
        f"reconstruct: {tokens:,} tokens through each of at most {layers} layers, in steps of "
        f"{in_step:,}; the model is checked {config.checks} times",
        f"  time at best {clock(config.tokens * operations / matmul_rate())}",
    ]


STAGE = ReconstructStage()
