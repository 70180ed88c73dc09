"""Automatic balance: every signal counts as much as the main loss, times its weight."""

from __future__ import annotations

DECAY = 0.98
"""Of the running means, per optimizer step: a memory of about 50 steps."""
MAIN = "main"


class Balance:
    """The factor of a signal: running mean of the main loss ÷ running mean of the signal.

    Both are exponential means over optimizer steps, equally begun, so that what they lack at first
    cancels. Constant within a step, whatever micro-batches it is made of. In the first step nothing
    is known yet, and the signals are only measured: their factor is 0.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def factor(self, name: str) -> float:
        """What the weight of signal `name` is multiplied by in this step."""
        mean = self.sums.get(name, 0.0)
        return self.sums[MAIN] / mean if mean > 0 else 0.0

    def update(self, means: dict[str, float]) -> None:
        """After a step, with its means per scored token by name: MAIN, the signals, the losses."""
        for name, value in means.items():
            self.sums[name] = DECAY * self.sums.get(name, 0.0) + (1 - DECAY) * value
