"""Sparsify: sets single weights to zero, a share of them or N:M, and keeps all shapes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator
from tyro.conf import OmitArgPrefixes

from regrow import plugins
from regrow.config import Config, Machine, check_pattern
from regrow.data.config import DataConfig
from regrow.errors import UserError, unknown
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, OptionalText, open_model, print_lines

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint
    from regrow.sparsity.pattern import Sparsity

METHODS = "regrow.stages.sparsify.methods"
DEFAULT = 0.5


class SparsifyConfig(Config):
    """How many weights become zero, which ones, and in which modules."""

    method: str = "sparsegpt"
    """How the weights are chosen: magnitude or random (which need no text), wanda, sparsegpt (which
    also changes the weights that stay), or a file of your own in sparsify/methods."""
    sparsity: float | None = None
    """Share of the weights that become zero, above 0 and below 1; 0.5 if no pattern is given."""
    pattern: str | None = None
    """N:M instead of a share: of M consecutive weights of a row, N stay. For instance 2:4."""
    keep: tuple[str, ...] = ()
    """Modules of the layers that stay dense: regular expressions, searched in the modules' names.
    Embedding, output head and routers always stay dense."""
    samples: int = Field(default=64, ge=8)
    """Sequences of calibration text; every eighth only serves to measure perplexity and KL."""
    damping: float = Field(default=0.01, gt=0)
    """For sparsegpt: this share of the second-moment matrix's mean diagonal is added to its
    diagonal."""
    rewind_to: str | None = None
    """An earlier checkpoint of this model: the zeros are chosen in the model as it is, and all
    other weights get their values there (a lottery ticket). A folder, a hub id, or, in a recipe,
    the folder of an earlier stage, such as 01-initialize."""
    seed: int = Field(default=0, ge=0)
    """Seed of the method random."""

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        known = plugins.names(METHODS)
        if method not in known:
            raise unknown("method", method, known)
        return method

    @field_validator("sparsity")
    @classmethod
    def _in_range(cls, sparsity: float | None) -> float | None:
        if sparsity is not None and not 0 < sparsity < 1:
            raise ValueError(
                f"{sparsity:g} is out of range: give the share of weights that become zero, above "
                "0 and below 1, for instance 0.5"
            )
        return sparsity

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str | None) -> str | None:
        from regrow.sparsity.pattern import parse

        return None if pattern is None else str(parse(pattern))

    @field_validator("keep")
    @classmethod
    def _patterns(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in keep:
            check_pattern(pattern)
        return keep

    @model_validator(mode="after")
    def _one_of_both(self) -> SparsifyConfig:
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError(
                f"sparsity {self.sparsity:g} and pattern {self.pattern} exclude each other: a "
                "pattern has its own share of zeros; give one of them"
            )
        return self

    @property
    def target(self) -> Sparsity:
        """The sparsity or the pattern."""
        from regrow.sparsity.pattern import Sparsity, parse

        if self.pattern is not None:
            return parse(self.pattern)
        return Sparsity(DEFAULT if self.sparsity is None else self.sparsity)


class SparsifyStage(Stage):
    """Sets weights of the current model to zero; later distillations keep these zeros."""

    config = SparsifyConfig
    changes_weights = True
    needs_plain_weights = True
    reads = ("calibration",)

    def command(
        self,
        model: Model,
        out: Path,
        text: OmitArgPrefixes[OptionalText] = OptionalText(),
        sparsification: OmitArgPrefixes[SparsifyConfig] = SparsifyConfig(),
        machine: OmitArgPrefixes[Machine] = Machine(),
        dry_run: bool = False,
    ) -> None:
        """Set weights to zero: a share of them, or N of M.

        Args:
            model: Hugging Face folder, hub id, GGUF file, or package:NAME.
            out: Folder to write the sparse model to.
            sparsification: Method, share or pattern, and the modules that stay dense.
            machine: Device and batch size.
            dry_run: Check everything and print what would be done.
        """
        checkpoint, data = open_model(model), text.blend() if text.data else None
        if dry_run:
            print_lines(estimate(checkpoint, data, sparsification), out)
            return
        from regrow.stages.sparsify.stage import sparsify

        sparsify(checkpoint, out, sparsification, data, machine.options())

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for modules, widths and an earlier model that do not fit.

        Where the sizes of a cut are searched for, only the names of modules are known.
        """
        from regrow.stages.sparsify.stage import check_shapes, choose_modules, earlier_shapes

        config, here = step.config, _shapes(plan, plan.config_now)
        if here is None:
            patterns = config.model_copy(update={"pattern": None, "sparsity": None})
            choose_modules(plan.family, patterns, plan.checkpoint.shapes)
        else:
            choose_modules(plan.family, config, here)
        if config.rewind_to is None:
            return
        number = _earlier_stage(step, plan)
        there = (
            earlier_shapes(config.rewind_to)
            if number is None
            else _shapes(plan, plan.configs[number - 1])
        )
        if here is not None and there is not None:
            check_shapes(config.rewind_to, there, here, "the model of this stage")

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """The zeros, the bytes and the time, if the model is the recipe's own."""
        if plan.config_now != plan.checkpoint.config or step.config.rewind_to is not None:
            return super().dry_run(step, plan)
        return estimate(plan.checkpoint, plan.data, step.config)

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """Note in the plan that the weights are sparse from here on."""
        from regrow.sparsity.zeros import NOTE

        plan.left[NOTE] = f"the weights are sparse after {step.location}"

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Sparsify the current model."""
        from regrow.stages.sparsify.stage import sparsify

        config, earlier = step.config, step.config.rewind_to
        if earlier is not None and (run.out / "stages" / earlier).is_dir():
            config = config.model_copy(update={"rewind_to": str(run.folder(earlier))})
        sparsify(run.current, run.folder(folder), config, run.data, run.options)
        run.add("sparse", run.folder(folder))


def _shapes(plan: RecipePlan, config: dict[str, Any] | None) -> dict[str, tuple[int, ...]] | None:
    """The shape of each tensor of a model with this config, which may not be known."""
    return None if config is None else plan.family.expected(config)


def _earlier_stage(step: Step, plan: RecipePlan) -> int | None:
    """The number of the earlier stage whose folder `rewind_to` is; None if it is another folder.

    Raises UserError for the folder of a later stage, or of one that writes no model.
    """
    name = step.config.rewind_to
    if name is None or not re.fullmatch(r"\d\d-\w+", name):
        return None
    here = next(n for n, each in enumerate(plan.steps) if each is step)
    folders = [
        f"{number:02d}-{each.name}"
        for number, each in enumerate(plan.steps[:here], start=1)
        if each.stage.changes_weights
    ]
    if name not in folders:
        known = ", ".join(folders) or "there is none before it"
        raise UserError(
            f"rewind_to {name}: give an earlier stage that writes a model ({known}), or a folder"
        )
    return int(name[:2])


def estimate(checkpoint: Checkpoint, data: DataConfig | None, config: SparsifyConfig) -> list[str]:
    """The number of zeros, the bytes, and the time of the passes over the text."""
    from regrow.calibration.modules import WEIGHT
    from regrow.cost import forward_seconds
    from regrow.runtime.progress import clock
    from regrow.stages.sparsify.stage import check

    job = check(checkpoint, config, data)
    names = [module + WEIGHT for module in job.modules]
    count = sum(math.prod(checkpoint.shapes[name]) for name in names)
    total = sum(map(checkpoint.bytes, checkpoint.names()))
    lines = [
        f"sparsify: {len(names)} matrices to {job.target} by {config.method}: about "
        f"{job.target.share * count:,.0f} of {count:,} weights become zero",
        f"  {total / 1e6:,.1f} MB, as before: zeros are stored like other values",
        *(f"  {line}" for line in job.notes()),
    ]
    if data is not None and (job.calibrates or job.early is None):
        passes = 2 if job.calibrates else 0.25  # two models read an eighth of the sequences
        seconds = forward_seconds(checkpoint, passes * config.samples * data.sequence_length)
        lines.append(f"  time about {clock(seconds)} for the passes over the text")
    return lines


STAGE = SparsifyStage()
