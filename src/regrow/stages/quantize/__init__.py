"""Quantize: stores a model's weights in 8 or 4 bits, in the compressed-tensors format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator
from tyro.conf import OmitArgPrefixes

from regrow import plugins
from regrow.config import Config, Machine, check_pattern
from regrow.data.config import DataConfig
from regrow.errors import unknown
from regrow.quantization import formats
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, OptionalText, open_model, print_lines

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint


METHODS = "regrow.stages.quantize.methods"


class QuantizeConfig(Config):
    """The scheme, the method, and the modules that are not quantized."""

    scheme: str = "int4"
    """Scheme of the weights: int8 (weights only), int8-dynamic and fp8 (also the inputs, with a
    scale per token), int4-g32, int4-g64 (= int4) or int4-g128 (32, 64 or 128 weights share a
    scale), int4-…-asym (with zero points). A layer whose number of columns is not a multiple of the
    group size gets a smaller group, or int8 if none fits."""
    method: str | None = None
    """Rounding method: a name in quantize/methods. By default rtn (round to nearest, needs no text)
    for layers in 8 bits, and gptq, which calibrates on text, for layers in 4 bits."""
    keep: tuple[str, ...] = ("lm_head", "embed_tokens")
    """Modules that stay in 16 bits: regular expressions, searched in the modules' names."""
    rules: dict[str, str] = Field(default_factory=dict)
    """Scheme by regular expression, searched in the modules' names; the first match applies."""
    samples: int = Field(default=64, ge=8)
    """Sequences of calibration text; every eighth only serves to measure perplexity and KL."""
    damping: float = Field(default=0.01, gt=0)
    """For gptq: this share of the second-moment matrix's mean diagonal is added to its diagonal."""
    dequantize: bool = False
    """Write the rounded weights as a plain checkpoint of the original size. Use this only if other
    stages must follow."""

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, scheme: str) -> str:
        return formats.find_scheme(scheme).name

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str | None) -> str | None:
        available = plugins.names(METHODS)
        if method is not None and method not in available:
            raise unknown("method", method, available)
        return method

    @field_validator("keep")
    @classmethod
    def _patterns(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in keep:
            check_pattern(pattern)
        return keep

    @field_validator("rules")
    @classmethod
    def _known_schemes(cls, rules: dict[str, str]) -> dict[str, str]:
        for pattern in rules:
            check_pattern(pattern)
        return {pattern: formats.find_scheme(name).name for pattern, name in rules.items()}


class QuantizeStage(Stage):
    """Stores the current model in fewer bits. A later export reads the model before this stage."""

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
        machine: OmitArgPrefixes[Machine] = Machine(),
        dry_run: bool = False,
    ) -> None:
        """Store a model's weights in 8 or 4 bits, as compressed-tensors.

        Args:
            model: Hugging Face folder, hub id, GGUF file, or package:NAME.
            out: Folder to write the quantized model to.
            quantization: Scheme, method, and the modules that are not quantized.
            machine: Device and batch size.
            dry_run: Check everything and print what would be done.
        """
        checkpoint, data = open_model(model), text.blend() if text.data else None
        if dry_run:
            print_lines(estimate(checkpoint, data, quantization), out)
            return
        from regrow.stages.quantize.stage import quantize

        quantize(checkpoint, out, quantization, data, machine.options())

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for a scheme or method that does not fit the model or the data."""
        from regrow.stages.quantize.stage import check

        check(plan.checkpoint, step.config, plan.data)

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """Record in the plan that the weights are final, unless `dequantize` is set."""
        if not step.config.dequantize:
            plan.quantized = step.location

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Quantize the current model; a later export reads the unquantized model."""
        from regrow.stages.quantize.stage import quantize

        plain = run.current
        quantize(plain, run.folder(folder), step.config, run.data, run.options)
        run.add("quantized", run.folder(folder))
        run.plain = plain


def estimate(checkpoint: Checkpoint, data: DataConfig | None, config: QuantizeConfig) -> list[str]:
    """Layers and bytes for each scheme and method, and the time of the passes over the text."""
    from regrow.calibration.modules import WEIGHT
    from regrow.cost import forward_seconds
    from regrow.cost.units import size_text
    from regrow.runtime.progress import clock
    from regrow.stages.quantize.choose import fallbacks
    from regrow.stages.quantize.stage import check, method_of

    job = check(checkpoint, config, data)
    shapes = checkpoint.shapes
    lines = [f"quantize: {len(job.chosen)} layers"]
    for scheme in job.schemes:
        modules = [module for module, own_scheme in job.chosen.items() if own_scheme == scheme]
        size = sum(scheme.type.bytes(*shapes[module + WEIGHT]) for module in modules)
        method = method_of(config, scheme)
        lines.append(f"  {len(modules)} layers in {scheme.name} by {method}: {size_text(size)}")
    kept = [name for name in shapes if name.removesuffix(WEIGHT) not in job.chosen]
    size = sum(math.prod(shapes[name]) * job.kept_dtype(name).itemsize for name in kept)
    lines.append(f"  {len(kept)} tensors not quantized: {size_text(size)}")
    lines += [f"  {line}" for line in (*fallbacks(checkpoint, config, job.chosen), *job.notes())]
    if data is not None:
        tokens = config.samples * data.sequence_length
        passes = 2 if job.calibrates else 0.25  # two models read an eighth of the sequences
        seconds = forward_seconds(checkpoint, passes * tokens)
        lines.append(f"  time about {clock(seconds)} for the passes over {tokens:,} tokens")
    return lines


STAGE = QuantizeStage()
