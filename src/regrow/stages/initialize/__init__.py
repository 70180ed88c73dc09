"""Initialize: write a model with random weights, to train it from a seed."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator
from tyro.conf import OmitArgPrefixes

from regrow.config import Config
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, print_lines


class InitializeConfig(Config):
    """The sizes of the model and the seed of its weights."""

    seed: int = Field(default=0, ge=0)
    """Seed of the random weights."""
    sizes: dict[str, int] = Field(default={})
    """Fields of config.json that replace the model's, by their names there, such as
    num_hidden_layers or intermediate_size. The other fields are the model's."""

    @field_validator("sizes")
    @classmethod
    def _positive(cls, sizes: dict[str, int]) -> dict[str, int]:
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} {size} is no size: give a number from 1")
        return sizes


class InitializeStage(Stage):
    """Replaces the current model by a random one of its family, with the same tokenizer."""

    config = InitializeConfig
    changes_weights = True

    def command(
        self,
        model: Model,
        out: Path,
        random: OmitArgPrefixes[InitializeConfig] = InitializeConfig(),
        dry_run: bool = False,
    ) -> None:
        """Write a model with random weights, from a model's config, tokenizer and a seed.

        Args:
            model: The model that gives the config and the tokenizer.
            out: Folder to write the random model to.
            random: Sizes and seed.
            dry_run: Check everything and print what would be written.
        """
        from regrow.checkpoint import load

        checkpoint = load(model)
        from regrow.stages.initialize.stage import describe, initialize

        if dry_run:
            print_lines([describe(checkpoint, random)], out)
            return
        initialize(checkpoint, out, random)

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for sizes that no model can have."""
        from regrow.stages.initialize.stage import check

        check(plan.checkpoint, step.config)

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """The number of parameters."""
        from regrow.stages.initialize.stage import describe

        return [describe(plan.checkpoint, step.config)]

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """Note the sizes of the random model, and that it has no zeros."""
        from regrow.sparsity.zeros import NOTE
        from regrow.stages.initialize.stage import check, parameters_of

        stock = check(plan.checkpoint, step.config)
        plan.config_now, plan.parameters = stock.to_dict(), parameters_of(stock)
        plan.left.pop(NOTE, None)

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Write a random model with the config of the recipe's model."""
        from regrow.stages.initialize.stage import initialize

        initialize(run.model, run.folder(folder), step.config)
        run.add("random", run.folder(folder))


STAGE = InitializeStage()
