"""What a command would do: sizes, memory and time, for --dry-run."""

from __future__ import annotations

import time
from typing import Any

import torch

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.data.config import DataConfig
from regrow.options import Options
from regrow.progress import clock
from regrow.recipe import Recipe
from regrow.search import SHOWN, blocks_for, check_keep_params
from regrow.search import passes_for as passes_of_search
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import check_tokenizers, steps_of
from regrow.stages.distill.student import Student
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.profile.collect import GRADIENTS, REMOVALS
from regrow.stages.profile.config import ProfileConfig
from regrow.stages.profile.removal import passes_for
from regrow.stages.profile.scoring import statistics_needed
from regrow.stages.profile.stage import estimate_bytes
from regrow.stages.prune.choose import full_sizes
from regrow.stages.prune.config import PruneConfig
from regrow.stages.prune.shapes import Shape
from regrow.stages.prune.stage import make_plan
from regrow.steps import check_one_target


def of_profile(checkpoint: Checkpoint, data: DataConfig, config: ProfileConfig) -> list[str]:
    """Tokens, passes, disk and time of a profile."""
    needs = set[str]().union(*statistics_needed(config).values())
    tokens = config.samples * data.sequence_length
    read = tokens * (3 if needs & GRADIENTS else 1)  # a backward pass, without weights' gradients
    removals = len(needs & REMOVALS.keys()) * passes_for(checkpoint.config["num_hidden_layers"])
    read += removals * min(config.removal_blocks, config.samples) * data.sequence_length
    seconds = read * 2 * _active(checkpoint) / matmul_rate()
    grams = min(config.gram_tokens, tokens)
    return [
        f"profile: {config.samples} blocks of {data.sequence_length} = {tokens:,} tokens, "
        f"Gram matrices of {', '.join(config.grams)} on {grams:,} of them",
        f"  disk {estimate_bytes(checkpoint, config) / 1e9:.2f} GB, time about {clock(seconds)} "
        "for the passes through the model, and the Gram matrices on top",
    ]


def of_prune(checkpoint: Checkpoint, config: PruneConfig, sequence_length: int = 512) -> list[str]:
    """Sizes of the shape asked for, or of each candidate, and the time to choose among them."""
    family = families.of(checkpoint)
    before = family.count(checkpoint.config)
    check_one_target(config)
    disk = sum(map(checkpoint.bytes, checkpoint.names())) / before
    shapes = check_keep_params(checkpoint, config)
    if not shapes:
        sizes = full_sizes(family, family.sizes(checkpoint.config), config.sizes())
        if config.plan is not None:
            sizes = make_plan(checkpoint, config, None).after
        changed = {dim: sizes[dim] for dim in config.sizes()}
        shapes = [Shape("to", changed, family.count(checkpoint.config, sizes))]
    lines = [f"prune: {before:,} parameters now; {'one of' if len(shapes) > 1 else 'to'}"]
    for shape in shapes[:SHOWN]:
        lines.append(
            f"  {shape.name:<16} {shape.parameters:,} ({shape.parameters / before:.1%})  "
            f"{shape.parameters * disk / 1e6:,.1f} MB  {shape.sizes or config.plan}"
        )
    if len(shapes) > SHOWN:
        lines.append(f"  … and {len(shapes) - SHOWN} more")
    tokens = blocks_for(len(shapes)) * sequence_length * passes_of_search(len(shapes))
    seconds = tokens * 2 * _active(checkpoint) / matmul_rate()
    return [*lines, f"  time about {clock(seconds)} to choose, and that of copying the files"]


def of_distill(
    student: Student,
    teacher: Checkpoint,
    data: DataConfig,
    config: DistillConfig,
    options: Options,
) -> list[str]:
    """Steps, memory and time of a distillation: 2 N_teacher + 6 N_student operations per token."""
    check_tokenizers(student.like, teacher)
    return _distill_lines(student.parameters, _parameters(teacher), data, config, options)


def of_evaluate(
    models: dict[str, Checkpoint],
    against: Checkpoint | None,
    data: DataConfig | None,
    config: EvaluateConfig,
) -> list[str]:
    """What would be measured of which models, their sizes, and the time to read the text."""
    tokens = len(config.texts) * config.text_tokens
    tokens += config.heldout_blocks * data.sequence_length if data is not None else 0
    lines = [f"evaluate: {', '.join(config.metrics)} on {tokens:,} tokens"]
    rate = matmul_rate()
    for label, checkpoint in {**models, **({"against": against} if against else {})}.items():
        checkpoint.tokenizer()
        size = sum(map(checkpoint.bytes, checkpoint.names()))
        seconds = 2 * _active(checkpoint) * tokens / rate
        lines.append(
            f"  {label}: {_parameters(checkpoint):,} parameters, {size / 1e6:,.1f} MB, about "
            f"{clock(seconds)} for the text, speed and generations on top"
        )
    return lines


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
            lines += (
                of_prune(checkpoint, config, recipe.data.sequence_length)
                if student == teacher
                else []
            )
            after = _after(checkpoint, config, student)
            if student != teacher:
                lines.append(f"prune: {student:,} parameters then; to about {after:,}")
            student = after
        elif isinstance(config, DistillConfig):
            lines += _distill_lines(student, teacher, recipe.data, config, options)
        else:
            lines.append(f"{step.name}: of what is there by then")
    return lines


def _after(checkpoint: Checkpoint, config: PruneConfig, before: int) -> int:
    """Parameters after a cut of a model that has `before` now and came from `checkpoint`."""
    if config.keep_params is not None:
        return int(before * config.keep_params)
    family = families.of(checkpoint)
    sizes = full_sizes(family, family.sizes(checkpoint.config), config.sizes())
    return min(before, family.count(checkpoint.config, sizes))


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
    steps, micro, accumulation = steps_of(config, data, options)
    seconds = config.tokens * (2 * teacher + 6 * student) / matmul_rate()
    return [
        f"distill: {steps} steps of {config.batch_tokens:,} tokens "
        f"({accumulation} micro-batches of {micro} blocks)",
        f"  memory {(16 * student + 2 * teacher) / 1e9:.2f} GB for weights, gradients, optimizer "
        f"and teacher, activations on top; time at best {clock(seconds)}",
    ]


def _parameters(checkpoint: Checkpoint) -> int:
    return families.of(checkpoint).count(checkpoint.config)


def _active(checkpoint: Checkpoint) -> int:
    """Parameters that one token runs through."""
    return families.of(checkpoint).active(checkpoint.config)
