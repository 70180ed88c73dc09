"""What leads to a smaller model: rotate, profile, compare, prune."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import OmitArgPrefixes

from regrow.commands._flags import Model, OptionalText, Text, open_model, print_lines
from regrow.options import Options
from regrow.stages.profile import ProfileConfig
from regrow.stages.prune import PruneConfig
from regrow.stages.rotate import RotateConfig


def rotate(
    model: Model,
    text: OmitArgPrefixes[Text],
    out: Path,
    config: OmitArgPrefixes[RotateConfig] = RotateConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Turn the residual stream, so that a cut of its channels (hidden) loses less.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write the turned model to.
        config: The text to measure on.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow.checkpoint import load
    from regrow.stages.rotate import rotate as stage
    from regrow.steps.rotate import estimate

    blend = text.blend()
    if dry_run:
        print_lines(estimate(load(model), blend, config), out)
        return
    stage(model, blend, out, config, options)


def profile(
    model: Model,
    text: OmitArgPrefixes[Text],
    out: Path,
    config: OmitArgPrefixes[ProfileConfig] = ProfileConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Measure what matters in a model on calibration text.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write the profile to.
        config: What to measure.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow.checkpoint import load
    from regrow.stages.profile import profile as stage
    from regrow.steps.profile import estimate

    blend = text.blend()
    if dry_run:
        print_lines(estimate(load(model), blend, config), out)
        return
    stage(model, blend, out, config, options)


def compare(
    model: Model,
    profile: Path,
    text: OmitArgPrefixes[Text],
    config: OmitArgPrefixes[PruneConfig] = PruneConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    out: Path | None = None,
    rounds: int = 1,
    heads: int = 0,
    dry_run: bool = False,
) -> None:
    """Make the same cut by every criterion of a profile, and print what each costs untrained.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        profile: Folder that regrow profile wrote for this model.
        config: What to prune to; its criterion is the one that is re-estimated.
        options: Device and portions.
        out: JSON file to write the table to.
        rounds: Compare single-shot importance with re-estimating it in so many rounds as well.
        heads: Remove one query head as well: the least important against one at random, this often.
        dry_run: Check everything and print what would be done.
    """
    from regrow.comparison import compare as by_each
    from regrow.comparison.estimate import estimate

    blend = text.blend()
    if dry_run:
        print_lines(estimate(open_model(model), profile, blend, config, rounds, heads))
        return
    by_each(model, profile, blend, config, out, options, rounds, heads)


def prune(
    model: Model,
    out: Path,
    profile: Path | None = None,
    text: OmitArgPrefixes[OptionalText] = OptionalText(),
    config: OmitArgPrefixes[PruneConfig] = PruneConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Cut a model to a share of its parameters, to sizes, or by a plan, and repair what is left.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write the smaller model to.
        profile: Folder that regrow profile wrote for this model.
        config: What to prune to, and how.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow.checkpoint import load
    from regrow.search import prune as to_target
    from regrow.steps.prune import estimate

    if dry_run:
        print_lines(estimate(load(model), config, text.sequence_length), out)
        return
    blend = text.blend() if text.data else None
    to_target(model, out, config, profile, blend, options)
