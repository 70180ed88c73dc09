"""A profile stage of a recipe."""

from __future__ import annotations

from regrow.checkpoint import Checkpoint
from regrow.data.config import DataConfig
from regrow.operations import active, matmul_rate
from regrow.options import Options
from regrow.progress import clock
from regrow.stages.profile import ProfileConfig, profile
from regrow.stages.profile.collect import GRADIENTS, REMOVALS
from regrow.stages.profile.removal import passes_for
from regrow.stages.profile.scoring import statistics_needed
from regrow.stages.profile.stage import estimate_bytes
from regrow.steps._job import Job
from regrow.steps._step import Step


def check(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    """Raise UserError for an unknown criterion or one that this config does not measure."""
    statistics_needed(step.config)


def run(job: Job, step: Step, name: str) -> None:
    """Of the current model, for the cuts that follow."""
    assert isinstance(step.config, ProfileConfig)
    profile(job.current, job.data, job.folder(name), step.config, job.options)
    job.profile = job.folder(name)


def estimate(checkpoint: Checkpoint, data: DataConfig, config: ProfileConfig) -> list[str]:
    """Tokens, passes, disk and time of a profile."""
    needs = set[str]().union(*statistics_needed(config).values())
    tokens = config.samples * data.sequence_length
    read = tokens * (3 if needs & GRADIENTS else 1)  # a backward pass, without weights' gradients
    removals = len(needs & REMOVALS.keys()) * passes_for(checkpoint.config["num_hidden_layers"])
    read += removals * min(config.removal_blocks, config.samples) * data.sequence_length
    seconds = read * 2 * active(checkpoint) / matmul_rate()
    grams = min(config.gram_tokens, tokens)
    return [
        f"profile: {config.samples} blocks of {data.sequence_length} = {tokens:,} tokens, "
        f"Gram matrices of {', '.join(config.grams)} on {grams:,} of them",
        f"  disk {estimate_bytes(checkpoint, config) / 1e9:.2f} GB, time about {clock(seconds)} "
        "for the passes through the model, and the Gram matrices on top",
    ]
