"""What a command would do: sizes, memory and time, for --dry-run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.data.config import DataConfig
from regrow.errors import UserError
from regrow.options import Options
from regrow.progress import clock
from regrow.recipe import Recipe
from regrow.search import check_keep_params
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import check_tokenizers, steps_of
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.profile.config import ProfileConfig
from regrow.stages.profile.stage import estimate_bytes, statistics_needed
from regrow.stages.prune.choose import full_sizes
from regrow.stages.prune.config import PruneConfig


def of_profile(checkpoint: Checkpoint, data: DataConfig, config: ProfileConfig) -> list[str]:
    """Tokens, passes, disk and time of a profile."""
    statistics_needed(config.criteria)
    tokens = config.samples * data.sequence_length
    seconds = tokens * 2 * _parameters(checkpoint) / matmul_rate()
    return [
        f"profile: {config.samples} blocks of {data.sequence_length} = {tokens:,} tokens, "
        f"Gram matrices of {', '.join(config.grams)} on {config.gram_tokens:,} of them",
        f"  disk {estimate_bytes(checkpoint, config) / 1e9:.2f} GB, time about {clock(seconds)} "
        "for the forward passes, and the Gram matrices on top",
    ]


def of_prune(checkpoint: Checkpoint, config: PruneConfig) -> list[str]:
    """Sizes of the shape asked for, or of each candidate."""
    family = families.of(checkpoint)
    before = family.count(checkpoint.config)
    shapes = check_keep_params(checkpoint, config)
    lines = [f"prune: {before:,} parameters now; {'one of' if len(shapes) > 1 else 'to'}"]
    if not shapes:
        sizes = full_sizes(family, family.sizes(checkpoint.config), config.sizes())
        if not config.sizes() and config.plan is None:
            raise UserError("nothing to prune to: give --keep-params, sizes, or --plan")
        after = family.count(checkpoint.config, sizes)
        named = config.plan or f"{after:,} ({after / before:.1%})  {config.sizes()}"
        return [*lines, f"  {named}"]
    for shape in shapes:
        share = shape.parameters / before
        lines.append(f"  {shape.name:<16} {shape.parameters:,} ({share:.1%})  {shape.sizes}")
    return lines


def of_distill(
    student: Checkpoint,
    teacher: Checkpoint,
    data: DataConfig,
    config: DistillConfig,
    options: Options,
) -> list[str]:
    """Steps, memory and time of a distillation: 2 N_teacher + 6 N_student operations per token."""
    check_tokenizers(student, teacher)
    return _distill_lines(_parameters(student), _parameters(teacher), data, config, options)


def of_evaluate(models: dict[str, str | Path], config: EvaluateConfig) -> list[str]:
    """What would be measured of which models."""
    for model in models.values():
        load(model)
    return [f"evaluate: {', '.join(config.metrics)} of {', '.join(models)}"]


def of_recipe(recipe: Recipe, options: Options) -> list[str]:
    """The lines of each stage, in order; sizes after a searched cut are the target's."""
    checkpoint = load(recipe.model)
    teacher = student = _parameters(checkpoint)
    lines: list[str] = []
    for step in recipe.steps():
        config: Any = step.config
        if isinstance(config, ProfileConfig):
            lines += of_profile(checkpoint, recipe.data, config)
        elif isinstance(config, PruneConfig):
            lines += of_prune(checkpoint, config)
            student = int(student * (config.keep_params or 1.0))
        elif isinstance(config, DistillConfig):
            lines += _distill_lines(student, teacher, recipe.data, config, options)
        else:
            lines.append(step.name)
    return lines


def matmul_rate() -> float:
    """Operations per second of a bf16 matrix product of a usual size here, measured now."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024, 1024, dtype=torch.bfloat16, device=device)
    _ = (a @ a)[0, 0].item()
    start = time.perf_counter()
    for _ in range(4):
        _ = (a @ a)[0, 0].item()
    return 4 * 2 * 1024**3 / (time.perf_counter() - start)


def _distill_lines(
    student: int, teacher: int, data: DataConfig, config: DistillConfig, options: Options
) -> list[str]:
    steps, accumulation = steps_of(config, data, options)
    seconds = config.tokens * (2 * teacher + 6 * student) / matmul_rate()
    return [
        f"distill: {steps} steps of {config.batch_tokens:,} tokens ({accumulation} micro-batches)",
        f"  memory {(16 * student + 2 * teacher) / 1e9:.2f} GB for weights, gradients, optimizer "
        f"and teacher, activations on top; time at best {clock(seconds)}",
    ]


def _parameters(checkpoint: Checkpoint) -> int:
    return families.of(checkpoint).count(checkpoint.config)
