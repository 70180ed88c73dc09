"""What a command would do: sizes, memory and time, for --dry-run."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from regrow import families, plugins
from regrow.checkpoint import Checkpoint, load
from regrow.checks import check_one_target
from regrow.comparison import line_up
from regrow.comparison.head_removal import check_heads
from regrow.data.config import DataConfig
from regrow.footprint import fallbacks, file_bytes, ram_bytes
from regrow.llama_cpp import threads
from regrow.options import Options
from regrow.progress import clock
from regrow.recipe import Recipe
from regrow.search import HANDFUL, SHOWN, blocks_for, check_keep_params, to_try
from regrow.search import passes_for as passes_of_search
from regrow.search.halving import rungs_for, tokens_for
from regrow.stages.cache.config import CacheConfig
from regrow.stages.cache.stage import header_of
from regrow.stages.distill.answers import digests_of, text_of
from regrow.stages.distill.budget import budget_of
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.mix import mix_of
from regrow.stages.distill.opposite import Opposite
from regrow.stages.distill.student import Student, check_student
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.gguf_file import GgufFile, find_parents
from regrow.stages.evaluate.task_rows import check_tasks
from regrow.stages.generate.config import GenerateConfig
from regrow.stages.generate.stage import ask
from regrow.stages.profile.collect import GRADIENTS, REMOVALS
from regrow.stages.profile.config import ProfileConfig
from regrow.stages.profile.removal import passes_for
from regrow.stages.profile.scoring import statistics_needed
from regrow.stages.profile.stage import estimate_bytes
from regrow.stages.prune.choose import full_sizes
from regrow.stages.prune.config import PruneConfig
from regrow.stages.prune.shapes import Shape
from regrow.stages.prune.stage import REPAIR, make_plan
from regrow.stages.quantize.choose import WEIGHT
from regrow.stages.quantize.choose import fallbacks as misfits
from regrow.stages.quantize.config import QuantizeConfig
from regrow.stages.quantize.stage import check as check_quantize
from regrow.stages.rotate.basis import check as check_rotation
from regrow.stages.rotate.basis import turned_config
from regrow.stages.rotate.config import RotateConfig
from regrow.statistics import Profile
from regrow.steps import fitted
from regrow.trial import TRIAL_BLOCKS, TRIAL_TOKENS


def of_rotate(checkpoint: Checkpoint, data: DataConfig, config: RotateConfig) -> list[str]:
    """Tokens, parameters and time of a rotation."""
    family = families.of(checkpoint)
    check_rotation(family)
    tokens = config.samples * data.sequence_length
    seconds = tokens * 2 * _active(checkpoint) / matmul_rate()
    before, after = (family.count(c) for c in (checkpoint.config, turned_config(checkpoint.config)))
    return [
        f"rotate: {config.samples} blocks of {data.sequence_length} = {tokens:,} tokens, time "
        f"about {clock(seconds)}; {before:,} parameters now, then {after:,}",
    ]


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
    if config.timed:
        return [_timed_line(config, before), *_search_lines(checkpoint, config, 0, sequence_length)]
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
            f"{shape.parameters * disk / 1e6:,.1f} MB  {_counted(checkpoint, config, shape)}"
            f"{shape.sizes or config.plan}"
        )
    if len(shapes) > SHOWN:
        lines.append(f"  … and {len(shapes) - SHOWN} more")
    model = (family, checkpoint.config, config.format)
    lines += [f"  {line}" for line in fallbacks(*model, shapes[0].sizes)]
    lines += _repair_lines(checkpoint, config)
    return [*lines, *_search_lines(checkpoint, config, to_try(config, shapes), sequence_length)]


def _repair_lines(checkpoint: Checkpoint, config: PruneConfig) -> list[str]:
    if not config.repair:
        return []
    method = plugins.load(REPAIR, config.repair_method)
    sizes = families.of(checkpoint).sizes(checkpoint.config)
    disk = method.work_bytes(sizes, config.repair_tokens) / 1e9
    if method.GRAMS:
        return [f"  repair: {config.repair_method}, on the profile's Gram matrices"]
    seconds = config.repair_tokens * 4 * 2 * _active(checkpoint) / matmul_rate()
    return [
        f"  repair: {config.repair_method}, on up to {config.repair_tokens:,} tokens of the "
        f"profile's text: time about {clock(seconds)}, disk {disk:.2f} GB meanwhile"
    ]


def _counted(checkpoint: Checkpoint, config: PruneConfig, shape: Shape) -> str:
    """Bytes in the format asked for, and in memory, where they were asked about."""
    model = (families.of(checkpoint), checkpoint.config, config.format)
    found = ""
    if config.format != "bf16" or config.max_bytes is not None:
        found += f"{file_bytes(*model, shape.sizes) / 1e6:,.1f} MB in {config.format}  "
    if config.max_ram is not None:
        ram = ram_bytes(*model, config.context_length, shape.sizes)
        found += f"{ram / 1e6:,.1f} MB of RAM at {config.context_length} tokens  "
    return found


def _timed_line(config: PruneConfig, before: int) -> str:
    return (
        f"prune: {before:,} parameters now; to one of about {config.num_candidates} shapes, which "
        "follow from timing a dozen on this machine"
    )


def _search_lines(
    checkpoint: Checkpoint, config: PruneConfig, shapes: int, sequence_length: int
) -> list[str]:
    """What the choice costs, untrained and in short distillations."""
    count = config.num_candidates if config.timed else shapes
    tokens, passes = blocks_for(count) * sequence_length, passes_of_search(count)
    total, rate = _parameters(checkpoint), matmul_rate()
    repaired = 4 * TRIAL_TOKENS * min(count, HANDFUL) if config.repair and count else 0
    choose = clock((tokens * passes + repaired) * 2 * total / rate)
    cost = f" (at most {passes:.1f} dense evaluations of {tokens:,} tokens)" if passes else ""
    lines = [f"  time about {choose} to choose{cost}, and that of copying the files"]
    if config.halving_tokens and count:
        few = min(config.halving_shapes, count)
        trained = tokens_for(few, config.halving_tokens)
        rungs = ", then ".join(
            f"{n} of {t:,} tokens" for n, t in rungs_for(few, config.halving_tokens)
        )
        seconds = trained * 8 * total / rate
        lines.append(f"  then distillations: {rungs}; time at best {clock(seconds)}")
    return lines


def of_compare(
    checkpoint: Checkpoint,
    folder: Path,
    data: DataConfig,
    config: PruneConfig,
    rounds: int,
    heads: int,
) -> list[str]:
    """The criteria, the cut, the text and the time of a comparison."""
    profile = Profile(folder)
    what = line_up(checkpoint, profile, config, rounds, heads)
    family = families.of(checkpoint)
    before, after = (family.count(checkpoint.config, sizes) for sizes in (None, what.after))
    tokens = TRIAL_BLOCKS * data.sequence_length
    rows = len(what.criteria) + (len(what.steps) > 1)
    passes = 1 + rows * (2 if config.repair else 1)
    if heads > 0:
        passes += 1 + 2 * (len(check_heads(profile)) + heads)
    again = max(0, len(what.steps) - 1) * profile.info["tokens"]
    seconds = (passes * tokens + again) * 2 * before / matmul_rate()
    lines = [
        f"compare: {', '.join(what.criteria) or 'no criterion'}",
        f"  cut to {after:,} parameters ({after / before:.1%}) {what.sizes}",
        f"  scored on {tokens:,} tokens of calibration text beyond the profile's",
    ]
    if len(what.steps) > 1:
        lines.append(f"  re-estimated in {len(what.steps)} rounds, {again:,} tokens to profile on")
    if heads > 0:
        lines.append(f"  one query head removed, the least important and {heads} times at random")
    repair = ", repair on top" if config.repair else ""
    return [*lines, f"  time about {clock(seconds)} for the passes through the model{repair}"]


def of_generate(checkpoint: Checkpoint, data: DataConfig, config: GenerateConfig) -> list[str]:
    """Prompts, the most tokens that may come, and the time if all came at the full rate."""
    asked = ask(data, config, checkpoint, checkpoint.tokenizer())
    read, most = sum(len(ids) for _, ids in asked), len(asked) * config.max_new_tokens
    seconds = (read + most) * 2 * _active(checkpoint) / matmul_rate()
    return [
        f"generate: {len(asked):,} prompts of {read:,} tokens, at most {most:,} tokens of answers",
        f"  time at best {clock(seconds)} if all are as long; small batches take many times that",
    ]


def of_cache(teacher: Checkpoint, data: DataConfig, config: CacheConfig) -> list[str]:
    """Tokens, disk and time of a cache: one pass, 2 N operations per token."""
    form = header_of(teacher, data, config).formats()["train"]
    heldout = config.heldout_blocks * data.sequence_length
    seconds = (config.tokens + heldout) * 2 * _active(teacher) / matmul_rate()
    size = config.tokens * form.bytes_per_token()
    return [
        f"cache: {config.format}, {config.tokens:,} tokens to train on and {heldout:,} held out",
        f"  disk at most {size / 1e9:.2f} GB ({form.bytes_per_token():,.0f} bytes per token), time "
        f"at best {clock(seconds)}",
    ]


def of_distill(
    student: Student,
    teacher: Checkpoint,
    data: DataConfig,
    config: DistillConfig,
    options: Options,
) -> list[str]:
    """Steps, memory and time of a distillation: 2 N_teacher + 6 N_student operations per token."""
    text = text_of(data, config)
    mix_of(config, text)
    digests_of(config)
    opposite = Opposite.open(config, student, teacher, options, text)
    check_student(student, config, options)
    teachers = sum(map(_parameters, opposite.checkpoints))
    return _distill_lines(student.parameters, teachers, data, config, options)


def of_quantize(
    checkpoint: Checkpoint, data: DataConfig | None, config: QuantizeConfig
) -> list[str]:
    """Layers and bytes by scheme, what is kept, and the time of the passes over the text."""
    job = check_quantize(checkpoint, config, data)
    shapes = checkpoint.shapes
    lines = [f"quantize: {len(job.chosen)} layers by {config.method}"]
    for name in sorted({scheme.name for scheme in job.chosen.values()}):
        some = [module for module, scheme in job.chosen.items() if scheme.name == name]
        bits = sum(job.chosen[module].stored_bits(*shapes[module + WEIGHT]) for module in some)
        lines.append(f"  {len(some)} layers in {name}: {bits / 8e6:,.1f} MB")
    kept = [name for name in shapes if name.removesuffix(WEIGHT) not in job.chosen]
    size = 2 * sum(math.prod(shapes[name]) for name in kept)
    lines.append(f"  {len(kept)} tensors kept in 16 bits: {size / 1e6:,.1f} MB")
    lines += [f"  {line}" for line in misfits(checkpoint, config, job.chosen)]
    if data is not None:
        tokens = config.samples * data.sequence_length
        passes = 2 if job.method.NEEDS_GRAM else 0.25  # of an eighth, two models
        seconds = passes * tokens * 2 * _active(checkpoint) / matmul_rate()
        lines.append(f"  time about {clock(seconds)} for the passes over {tokens:,} tokens")
    return lines


def of_evaluate(
    models: dict[str, Checkpoint | GgufFile],
    against: Checkpoint | None,
    data: DataConfig | None,
    config: EvaluateConfig,
) -> list[str]:
    """What would be measured of which models, their sizes, and the time to read the text."""
    tokens = len(config.texts) * config.text_tokens
    tokens += config.heldout_blocks * data.sequence_length if data is not None else 0
    lines = [f"evaluate: {', '.join(config.metrics)} on {tokens:,} tokens"]
    lines += [f"  {line}" for line in check_tasks(config)]
    rate = matmul_rate()
    every = {**models, **({"against": against} if against else {})}
    find_parents(every, "against")
    for label, checkpoint in every.items():
        checkpoint.tokenizer()
        if isinstance(checkpoint, GgufFile):
            what = f"{checkpoint.parameters:,} parameters, {checkpoint.bytes / 1e6:,.1f} MB"
            lines.append(f"  {label}: {what}, by llama.cpp with {threads()} threads")
            continue
        size = sum(map(checkpoint.bytes, checkpoint.names()))
        seconds = 2 * _active(checkpoint) * tokens / rate
        lines.append(
            f"  {label}: {_parameters(checkpoint):,} parameters, {size / 1e6:,.1f} MB, about "
            f"{clock(seconds)} for the text; speed, tasks and generations on top"
        )
    return lines


def of_recipe(recipe: Recipe, options: Options) -> list[str]:
    """The lines of each stage, in order; sizes after a searched cut are the target's."""
    checkpoint = load(recipe.model)
    teacher = student = _parameters(checkpoint)
    lines: list[str] = []
    cached: set[str | None] = set()
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
        elif isinstance(config, CacheConfig):
            against = load(step.teacher) if step.teacher else checkpoint
            lines += of_cache(against, recipe.data, fitted(step, recipe.steps(), recipe.model))
            cached.add(step.teacher)
        elif isinstance(config, DistillConfig):
            others = sum(_parameters(load(name)) for name in config.blend)
            if step.teacher in cached:
                config = config.model_copy(update={"cache": "cached by then"})
            lines += _distill_lines(student, teacher + others, recipe.data, config, options)
        else:
            lines.append(f"{step.name}: of what is there by then")
    return lines


def _after(checkpoint: Checkpoint, config: PruneConfig, before: int) -> int:
    """Parameters after a cut of a model that has `before` now and came from `checkpoint`."""
    if config.keep_params is not None:
        return int(before * config.keep_params)
    family = families.of(checkpoint)
    if config.searches:
        shapes = check_keep_params(checkpoint, config)
        return shapes[0].parameters if shapes else before
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
    steps, micro, accumulation = budget_of(config, data, options)
    teacher = 0 if config.cache else teacher
    # Operations per token, bytes per parameter: frozen weights have no gradient and no moments.
    work, held = {"none": (6, 16.0), "lora": (4, 2.0), "qlora": (4, 0.6)}[config.adapter]
    seconds = config.tokens * (2 * teacher + work * student) / matmul_rate()
    return [
        f"distill: {steps} steps of {config.batch_tokens:,} tokens "
        f"({accumulation} micro-batches of {micro} blocks)",
        f"  memory {(held * student + 2 * teacher) / 1e9:.2f} GB for weights, gradients, optimizer "
        f"and teacher, activations on top; time at best {clock(seconds)}",
    ]


def _parameters(checkpoint: Checkpoint) -> int:
    return families.of(checkpoint).count(checkpoint.config)


def _active(checkpoint: Checkpoint) -> int:
    """Parameters that one token runs through."""
    return families.of(checkpoint).active(checkpoint.config)
