"""How a budget of tokens becomes steps of the optimizer."""

from __future__ import annotations

from typing import NamedTuple

from regrow import ranks
from regrow.data import DataConfig
from regrow.errors import UserError
from regrow.options import Options
from regrow.stages.distill.config import DistillConfig


class Budget(NamedTuple):
    """Optimizer steps, blocks per micro-batch, micro-batches per step and device."""

    steps: int
    micro: int
    accumulation: int


def budget_of(config: DistillConfig, data: DataConfig, options: Options) -> Budget:
    """The budget of `config.tokens`; a micro-batch has at most `options.batch_size` blocks.

    Raises UserError when batch_tokens cannot be made of whole blocks on every device.
    """
    devices = ranks.world_size()
    unit = data.sequence_length * devices
    if config.batch_tokens % unit:
        raise UserError(
            f"batch_tokens {config.batch_tokens} is no multiple of {unit} (sequence_length "
            f"{data.sequence_length} × {devices} devices); change one of them"
        )
    blocks = config.batch_tokens // unit
    micro = max(n for n in range(1, min(options.batch_size, blocks) + 1) if blocks % n == 0)
    return Budget(steps_in(config), micro, blocks // micro)


def steps_in(config: DistillConfig) -> int:
    """Optimizer steps of the budget."""
    return max(1, round(config.tokens / config.batch_tokens))
