"""The output losses that a config asks for."""

from __future__ import annotations

from regrow.stages.distill.config import DistillConfig
from regrow.training.head import Mix


def mix_of(config: DistillConfig) -> Mix:
    """The weighted losses with their options."""
    return Mix(config.losses, config.temperature, config.beta, config.skew, config.exact_head)
