"""Learn masks: learn in training which units a model of a given shape can do without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator
from tyro.conf import OmitArgPrefixes

from regrow import plugins
from regrow.config import Config, Machine
from regrow.data.config import DataConfig
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, Text, open_model, print_lines

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint

LOSSES = "regrow.training.losses"
FIELDS = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
}
"""The field of each dimension that masks can cut."""
CRITERION = "learned_masks"
PROFILE = "profile"
"""The folder of the scores, inside the model's folder."""


class LearnMasksConfig(Config):
    """The shape that the masks shall reach, and the training that leads there."""

    num_layers: int | None = None
    """Number of layers of the target shape. Sizes that are not given stay as they are."""
    hidden_size: int | None = None
    """Number of channels of the residual stream."""
    intermediate_size: int | None = None
    """Number of MLP channels in every layer."""
    num_attention_heads: int | None = None
    """Number of query heads in every layer, equally many for each key/value head."""
    num_key_value_heads: int | None = None
    """Number of key/value heads in every layer."""
    multiple_of: int = Field(default=32, ge=1)
    """Refuse changed widths that are no multiple of this; give the same number to prune."""
    train_weights: bool = True
    """Train the weights together with the masks. Otherwise only the masks learn."""
    losses: dict[str, float] = Field(default_factory=lambda: {"cross_entropy": 1.0})
    """Weight of each loss by its name: cross_entropy of the text, or losses towards the model as it
    was, such as forward_kl."""
    tokens: int = Field(default=500_000, ge=1)
    """Tokens to train on."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Tokens per optimizer step."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Learning rate of the weights (AdamW, constant after a warm-up of a tenth of the steps)."""
    mask_rate: float = Field(default=0.2, gt=0)
    """Learning rate of the masks' log α (Adam)."""
    multiplier_rate: float = Field(default=1.0, gt=0)
    """Rate at which the multipliers of the target shape rise, per step and gap."""
    penalty: float = Field(default=50.0, ge=0)
    """The first value of the multipliers φ of the squared gaps. With 0, a short training does not
    reach the shape, or leaves it again."""
    target_warmup: float = Field(default=0.5, ge=0, lt=1)
    """Share of the steps in which the target falls from the whole model to its shape."""
    samples: int = Field(default=64, ge=1)
    """Sequences of calibration text that the folder keeps for a later repair."""
    heldout_sequences: int = Field(default=16, ge=1)
    """Sequences of the validation split on which the chosen shape is measured."""
    save_tokens: int = Field(default=50_000, ge=1)
    """Training tokens between two states on disk, from which an interrupted run continues."""
    seed: int = 0
    """Seed of the masks' noise."""

    @field_validator("losses")
    @classmethod
    def _known_losses(cls, losses: dict[str, float]) -> dict[str, float]:
        return plugins.check_weights(LOSSES, "loss", losses)

    @model_validator(mode="after")
    def _some_size(self) -> LearnMasksConfig:
        if not self.sizes():
            raise ValueError(f"give the target shape: one or more of {', '.join(FIELDS.values())}")
        return self

    def sizes(self) -> dict[str, int]:
        """The sizes of the target shape that are given, by dimension."""
        sizes = {dim: getattr(self, key) for dim, key in FIELDS.items()}
        return {dim: size for dim, size in sizes.items() if size is not None}


class LearnMasksStage(Stage):
    """Trains the current model with masks, and stores their scores as the model's profile."""

    config = LearnMasksConfig
    changes_weights = True
    needs_plain_weights = True
    reads = ("calibration", "validation", "train")

    def command(
        self,
        model: Model,
        text: OmitArgPrefixes[Text],
        out: Path,
        masks: OmitArgPrefixes[LearnMasksConfig],
        machine: OmitArgPrefixes[Machine] = Machine(),
        dry_run: bool = False,
    ) -> None:
        """Learn in training which units to prune, for a given shape.

        Args:
            model: Hugging Face folder, hub id, GGUF file, or package:NAME.
            out: Folder to write the trained model and its profile to.
            masks: Target shape, losses and budget.
            machine: Device and batch size.
            dry_run: Check everything and print what would be done.
        """
        checkpoint, data = open_model(model), text.blend()
        from regrow.stages.learn_masks.stage import learn_masks, refuse_sparse

        if dry_run:
            refuse_sparse(checkpoint, masks)
            print_lines(estimate(checkpoint, data, masks), out)
            return

        learn_masks(checkpoint, data, out, masks, machine.options())

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for a shape that the model cannot have, and for sparse weights."""
        from regrow.sparsity.zeros import NOTE, would_fill
        from regrow.stages.learn_masks.stage import ADVICE, check

        if NOTE in plan.left and step.config.train_weights:
            raise would_fill(plan.left[NOTE], "training with masks", ADVICE)
        check(plan.checkpoint, plan.data, step.config, plan.config_now)

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """The steps and the time."""
        return estimate(plan.checkpoint, plan.data, step.config, plan.config_now)

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """Record that the current model has a profile."""
        plan.note_profile((CRITERION,), step.config.samples, gram_tokens=0)

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Learn the masks of the current model; the trained model is the current one then."""
        from regrow.stages.learn_masks.stage import learn_masks

        out = run.folder(folder)
        learn_masks(run.current, run.data, out, step.config, run.options)
        run.add("trained with masks", out)
        run.profile = out / PROFILE


def estimate(
    checkpoint: Checkpoint,
    data: DataConfig,
    config: LearnMasksConfig,
    config_now: dict[str, Any] | None = None,
) -> list[str]:
    """The masks, the steps and the time; `config_now` has other sizes than the model, if given."""
    from regrow.cost import parameters, seconds_for, training_operations
    from regrow.runtime.progress import clock
    from regrow.stages.learn_masks.stage import check

    masks, steps = check(checkpoint, data, config, config_now)
    count = sum(log_alpha.numel() for log_alpha in masks.log_alphas.values())
    operations = training_operations(parameters(checkpoint), 0, "none")
    return [
        f"learn_masks: {count:,} masks for the shape {masks.after}, {steps} steps of "
        f"{config.batch_tokens:,} tokens, time at best "
        f"{clock(seconds_for(config.tokens, operations))}"
    ]


STAGE = LearnMasksStage()
