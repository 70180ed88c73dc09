"""What a finished model goes through: quantize, export, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from regrow.commands._flags import (
    Model,
    OptionalText,
    by_name,
    open_measured,
    open_model,
    print_lines,
)
from regrow.options import Options
from regrow.stages.evaluate import EvaluateConfig
from regrow.stages.export import ExportConfig
from regrow.stages.quantize import QuantizeConfig


def quantize(
    model: Model,
    out: Path,
    text: OmitArgPrefixes[OptionalText] = OptionalText(),
    config: OmitArgPrefixes[QuantizeConfig] = QuantizeConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Store a model's weights in 8 or 4 bits, calibrated on text, as compressed-tensors.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write the quantized model to.
        config: Scheme, method, and what is left out.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow.stages.quantize import quantize as stage
    from regrow.steps.quantize import estimate

    blend = text.blend() if text.data else None
    if dry_run:
        print_lines(estimate(open_model(model), blend, config), out)
        return
    stage(open_model(model), out, config, blend, options)


def export(
    model: Model,
    out: Path,
    text: OmitArgPrefixes[OptionalText] = OptionalText(),
    config: OmitArgPrefixes[ExportConfig] = ExportConfig(),
    dry_run: bool = False,
) -> None:
    """Write a GGUF file for llama.cpp and Ollama, and prove it by llama.cpp.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write to, or the file's name, NAME.gguf.
        config: The file's type, and how it is proven.
        dry_run: Check everything and print what would be done.
    """
    from regrow.checkpoint import load
    from regrow.stages.export.stage import describe
    from regrow.stages.export.stage import export as stage

    blend = text.blend() if text.data else None
    if dry_run:
        folder = None if out.suffix == ".gguf" else out
        print_lines(describe(load(model), config, model), folder)
        return
    print(stage(model, out, config, blend))


def evaluate(
    models: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL")],
    out: Path,
    text: OmitArgPrefixes[OptionalText] = OptionalText(),
    against: str | None = None,
    config: OmitArgPrefixes[EvaluateConfig] = EvaluateConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Measure models side by side: perplexity, KL to the teacher, size, speed, generations.

    Args:
        models: Model folders, and files NAME.gguf, which llama.cpp runs; NAME=MODEL gives one a
            name.
        out: Folder to write the evaluation to.
        against: The teacher, for KL and ratios.
        config: What to measure.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow.stages.evaluate import evaluate as stage
    from regrow.steps.evaluate import estimate

    named = {name: open_measured(model) for name, model in by_name(models).items()}
    master = None if against is None else open_model(against, quantized=True)
    blend = text.blend() if text.data else None
    if dry_run:
        print_lines(estimate(named, master, blend, config), out)
        return
    stage(named, out, blend, master, config, options)
