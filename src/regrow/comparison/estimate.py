"""What `regrow compare --dry-run` prints."""

from __future__ import annotations

from pathlib import Path

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.comparison.criteria import line_up
from regrow.comparison.head_removal import check_heads
from regrow.data.config import DataConfig
from regrow.operations import matmul_rate
from regrow.progress import clock
from regrow.stages.prune.config import PruneConfig
from regrow.statistics import Profile
from regrow.trial import TRIAL_BLOCKS


def estimate(
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
