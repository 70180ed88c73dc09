"""A quantize stage of a recipe."""

from __future__ import annotations

import math

from regrow.checkpoint import Checkpoint
from regrow.data.config import DataConfig
from regrow.operations import active, matmul_rate
from regrow.options import Options
from regrow.progress import clock
from regrow.stages.quantize import QuantizeConfig, quantize
from regrow.stages.quantize.choose import WEIGHT, fallbacks
from regrow.stages.quantize.stage import check as check_quantize
from regrow.steps._job import Job
from regrow.steps._step import Step


def check(step: Step, checkpoint: Checkpoint, data: DataConfig, options: Options) -> None:
    """Raise UserError for schemes and methods that these layers cannot have."""
    check_quantize(checkpoint, step.config, data)


def run(job: Job, step: Step, name: str) -> None:
    """The current model in fewer bits; a later export is made from the one before."""
    assert isinstance(step.config, QuantizeConfig)
    plain = job.current
    quantize(plain, job.folder(name), step.config, job.data, job.options)
    job.add("quantized", job.folder(name))
    job.plain = plain


def estimate(checkpoint: Checkpoint, data: DataConfig | None, config: QuantizeConfig) -> list[str]:
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
    lines += [f"  {line}" for line in fallbacks(checkpoint, config, job.chosen)]
    if data is not None:
        tokens = config.samples * data.sequence_length
        passes = 2 if job.method.NEEDS_GRAM else 0.25  # of an eighth, two models
        seconds = passes * tokens * 2 * active(checkpoint) / matmul_rate()
        lines.append(f"  time about {clock(seconds)} for the passes over {tokens:,} tokens")
    return lines
