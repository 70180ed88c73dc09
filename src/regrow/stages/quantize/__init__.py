"""Quantize: store a model's weights in 8 or 4 bits, as compressed-tensors."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator
from tyro.conf import OmitArgPrefixes

from regrow import plugins
from regrow.config import Config, Options
from regrow.data.config import DataConfig
from regrow.errors import unknown
from regrow.quantization import formats
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, OptionalText, open_model, print_lines

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint


METHODS = "regrow.stages.quantize.methods"


class QuantizeConfig(Config):
    """Scheme, method, and what is left out."""

    scheme: str = "int4"
    """int8 (weights alone), int8-dynamic and fp8 (inputs too, scaled per token), int4-g32, int4-g64
    (= int4) or int4-g128 (that many weights to a scale), int4-…-asym (with zero points). A layer
    whose columns are no multiple of the group gets a smaller group, or int8 if none fits."""
    method: str = "gptq"
    """How weights are rounded: a name in quantize/methods."""
    keep: tuple[str, ...] = ("lm_head", "embed_tokens")
    """Modules left in 16 bits: regular expressions, searched in their names."""
    rules: dict[str, str] = Field(default_factory=dict)
    """Scheme by regular expression, for the modules whose name has it; the first that fits."""
    samples: int = Field(default=64, ge=8)
    """Calibration blocks; every eighth is not calibrated on but measured on."""
    damping: float = Field(default=0.01, gt=0)
    """For gptq: share of its mean diagonal that is added to the second-moment matrix."""
    dequantize: bool = False
    """Write the rounded weights as a plain checkpoint, which saves nothing: for stages that come
    after this one although it should be the last."""

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, scheme: str) -> str:
        return formats.find_scheme(scheme).name

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        known = plugins.names(METHODS)
        if method not in known:
            raise unknown("method", method, known)
        return method

    @field_validator("keep")
    @classmethod
    def _patterns(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in keep:
            _check(pattern)
        return keep

    @field_validator("rules")
    @classmethod
    def _known_schemes(cls, rules: dict[str, str]) -> dict[str, str]:
        for pattern in rules:
            _check(pattern)
        return {pattern: formats.find_scheme(name).name for pattern, name in rules.items()}


def _check(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


class QuantizeStage(Stage):
    """Takes the current model; leaves it in fewer bits. Export still takes the model before."""

    config = QuantizeConfig
    changes_weights = True
    needs_plain_weights = True
    reads = ("calibration",)

    def command(
        self,
        model: Model,
        out: Path,
        text: OmitArgPrefixes[OptionalText] = OptionalText(),
        quantization: OmitArgPrefixes[QuantizeConfig] = QuantizeConfig(),
        machine: OmitArgPrefixes[Options] = Options(),
        dry_run: bool = False,
    ) -> None:
        """Store a model's weights in 8 or 4 bits, calibrated on text, as compressed-tensors.

        Args:
            model: Hugging Face folder, hub id, GGUF file, or package:NAME.
            out: Folder to write the quantized model to.
            quantization: Scheme, method, and which layers are left out.
            machine: Device and batch size.
            dry_run: Check everything and print what would be done.
        """
        checkpoint, data = open_model(model), text.blend() if text.data else None
        if dry_run:
            print_lines(estimate(checkpoint, data, quantization), out)
            return
        from regrow.stages.quantize.stage import quantize

        quantize(checkpoint, out, quantization, data, machine)

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for schemes and methods that these layers cannot have."""
        from regrow.stages.quantize.stage import check

        check(plan.checkpoint, step.config, plan.data)

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """Weights are final from here on, unless they are written back dequantized."""
        if not step.config.dequantize:
            plan.quantized = step.location

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Quantize the current model; a later export is made from the one before."""
        from regrow.stages.quantize.stage import quantize

        plain = run.current
        quantize(plain, run.folder(folder), step.config, run.data, run.options)
        run.add("quantized", run.folder(folder))
        run.plain = plain


def estimate(checkpoint: Checkpoint, data: DataConfig | None, config: QuantizeConfig) -> list[str]:
    """Layers and bytes by scheme, what is kept, and the time of the passes over the text."""
    from regrow.cost import forward_seconds
    from regrow.runtime.progress import clock
    from regrow.stages.quantize.choose import WEIGHT, fallbacks
    from regrow.stages.quantize.stage import check

    job = check(checkpoint, config, data)
    shapes = checkpoint.shapes
    lines = [f"quantize: {len(job.chosen)} layers by {config.method}"]
    for name in sorted({scheme.name for scheme in job.chosen.values()}):
        some = [module for module, scheme in job.chosen.items() if scheme.name == name]
        size = sum(job.chosen[module].type.bytes(*shapes[module + WEIGHT]) for module in some)
        lines.append(f"  {len(some)} layers in {name}: {size / 1e6:,.1f} MB")
    kept = [name for name in shapes if name.removesuffix(WEIGHT) not in job.chosen]
    size = 2 * sum(math.prod(shapes[name]) for name in kept)
    lines.append(f"  {len(kept)} tensors kept in 16 bits: {size / 1e6:,.1f} MB")
    lines += [f"  {line}" for line in fallbacks(checkpoint, config, job.chosen)]
    if data is not None:
        tokens = config.samples * data.sequence_length
        passes = 2 if job.method.NEEDS_GRAM else 0.25  # of an eighth, two models
        seconds = forward_seconds(checkpoint, passes * tokens)
        lines.append(f"  time about {clock(seconds)} for the passes over {tokens:,} tokens")
    return lines


STAGE = QuantizeStage()
