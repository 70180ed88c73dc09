"""The output of `--dry-run` for a prune, and the model sizes after the prune."""

from __future__ import annotations

from typing import Any

from regrow import families, plugins
from regrow.checkpoint import Checkpoint
from regrow.cost import (
    FORWARD,
    fallbacks,
    file_bytes,
    forward_seconds,
    parameters,
    ram_bytes,
    seconds_for,
    training_operations,
)
from regrow.errors import UserError
from regrow.families import Family
from regrow.pruning.choose import full_sizes
from regrow.pruning.config import PLAIN, PruneConfig
from regrow.pruning.prune import check_cuts, make_plan
from regrow.pruning.repair import REPAIR
from regrow.runtime.progress import clock
from regrow.search.score import SCORER_REPAIR_TOKENS, finalists_for, passes_for, sequences_for
from regrow.search.shapes import Shape, check_keep_params, to_try
from regrow.stages.prune.choose_shape import SHOWN, rungs_for, tokens_for

PASSES = 3  # over the text in a sequential repair: dense, cut, and about one for solving


def check_one_target(config: PruneConfig) -> None:
    """Raise UserError unless the config has exactly one of: a search target, sizes, a plan."""
    targets = (config.searches, bool(config.sizes()), config.plan is not None)
    if sum(targets) != 1:
        problem = "no target to prune to" if not any(targets) else "more than one target"
        raise UserError(f"{problem}: give keep_params, or sizes such as num_layers, or a plan")


def estimate(
    checkpoint: Checkpoint,
    config: PruneConfig,
    sequence_length: int = 512,
    profile_tokens: int | None = None,
) -> list[str]:
    """Sizes of the shape or of each candidate, and the time for the search and the repair.

    `profile_tokens` is the number of tokens in the profile, which limits a repair; None: unknown.
    """
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
    model = (family, checkpoint.config, shapes[0].format or config.format)
    lines += [f"  {line}" for line in fallbacks(*model, shapes[0].sizes)]
    lines += _repair_lines(checkpoint, config, profile_tokens)
    return [*lines, *_search_lines(checkpoint, config, to_try(config, shapes), sequence_length)]


def parameters_after(checkpoint: Checkpoint, config: PruneConfig, before: int) -> int:
    """Parameters after a cut of a model with `before` parameters, derived from `checkpoint`."""
    if config.keep_params is not None:
        return int(before * config.keep_params)
    family = families.of(checkpoint)
    if config.searches:
        shapes = check_keep_params(checkpoint, config)
        return shapes[0].parameters if shapes else before
    sizes = full_sizes(family, family.sizes(checkpoint.config), config.sizes())
    return min(before, family.count(checkpoint.config, sizes))


def config_after(
    now: dict[str, Any] | None, family: Family, config: PruneConfig
) -> dict[str, Any] | None:
    """A model's config after a cut to explicit sizes; None when the sizes are not known yet."""
    if now is None or not config.sizes():
        return None
    before = family.sizes(now)
    after = full_sizes(family, before, config.sizes())
    check_cuts(config, before, after)
    families.check_sizes(family, now, after, config.multiple_of)
    sizes = {key: after[dim] for dim, key in family.config_keys.items()}
    return {**now, **sizes, "head_dim": before["head_dim"]}


def _repair_lines(
    checkpoint: Checkpoint, config: PruneConfig, profile_tokens: int | None
) -> list[str]:
    if not config.repair:
        return []
    method = plugins.load(REPAIR, config.repair_method)
    sizes = families.of(checkpoint).sizes(checkpoint.config)
    if method.GRAMS:
        return [f"  repair: {config.repair_method}, on the profile's Gram matrices"]
    tokens = min(config.repair_tokens, profile_tokens or config.repair_tokens)
    disk = method.work_bytes(sizes, tokens) / 1e9
    seconds = forward_seconds(checkpoint, PASSES * tokens)
    limit = "" if profile_tokens else "up to "
    return [
        f"  repair: {config.repair_method}, on {limit}{tokens:,} tokens of the profile's text: "
        f"time about {clock(seconds)}, disk {disk:.2f} GB meanwhile"
    ]


def _counted(checkpoint: Checkpoint, config: PruneConfig, shape: Shape) -> str:
    """Bytes on disk and in memory, if the config limits them."""
    format = shape.format or config.format
    model = (families.of(checkpoint), checkpoint.config, format)
    text = ""
    if format != PLAIN or config.max_bytes is not None:
        text += f"{file_bytes(*model, shape.sizes) / 1e6:,.1f} MB in {format}  "
    if config.max_ram is not None:
        ram = ram_bytes(*model, config.context_length, shape.sizes)
        text += f"{ram / 1e6:,.1f} MB of RAM at {config.context_length} tokens  "
    return text


def _timed_line(config: PruneConfig, before: int) -> str:
    return (
        f"prune: {before:,} parameters now; to one of about {config.num_candidates} shapes, which "
        "follow from timing a dozen on this machine"
    )


def _search_lines(
    checkpoint: Checkpoint, config: PruneConfig, shapes: int, sequence_length: int
) -> list[str]:
    """The cost of scoring the shapes without training and with short distillations."""
    count = config.num_candidates if config.timed else shapes
    finalists = min(finalists_for(config), count)
    tokens, passes = sequences_for(count) * sequence_length, passes_for(count, finalists)
    total = parameters(checkpoint)
    repaired = PASSES * SCORER_REPAIR_TOKENS * finalists
    choose = clock(seconds_for(tokens * passes + repaired, FORWARD * total))
    cost = f" (at most {passes:.1f} dense evaluations of {tokens:,} tokens)" if passes else ""
    lines = [f"  time about {choose} to choose{cost}, and that of copying the files"]
    if config.halving_tokens and count:
        few = min(config.halving_shapes, count)
        trained = tokens_for(few, config.halving_tokens)
        rungs = ", then ".join(
            f"{n} of {t:,} tokens" for n, t in rungs_for(few, config.halving_tokens)
        )
        seconds = seconds_for(trained, training_operations(total, total))
        lines.append(f"  then distillations: {rungs}; time at best {clock(seconds)}")
    return lines
