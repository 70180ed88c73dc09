"""Repair: new weights, without training, for the projections that read a pruned dimension.

Each file in this folder, unless its name begins with `_`, is a repair method:

    GRAMS: bool     whether it reads the Gram matrices of the profile
    repair(setup: RepairSetup, ridges: tuple[float, ...] = RIDGES) -> Repaired
    work_bytes(sizes: dict[str, int], tokens: int) -> int       bytes written to `setup.work`

A method minimizes the error of each layer separately. `_validate.py` then measures whether the
whole model improves; a repair that does not help is not applied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from regrow import plugins
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.families import Family
from regrow.plan import Plan
from regrow.profile_folder import Profile
from regrow.pruning.config import PruneConfig

REPAIR = "regrow.pruning.repair"
"""The package of the repair methods, for `plugins`."""

Solutions = dict[str, tuple[float | None, float, float]]
"""Per tensor: λ (None if the weights were not changed), error before, error after."""


@dataclass(frozen=True)
class RepairSetup:
    """The input of a repair method; `work` is a folder for its temporary files."""

    checkpoint: Checkpoint
    family: Family
    profile: Profile
    plan: Plan
    work: Path
    options: Options
    tokens: int = 0
    """Maximum number of calibration tokens, for methods that run text."""
    upstream: float = 1.0
    """Share of the error of earlier layers that a layer corrects."""

    def with_whole_vocabulary(self) -> RepairSetup:
        """The same setup without a cut of the vocabulary.

        The profile's text has the dense model's token ids, and layers do not depend on the
        vocabulary.
        """
        after = {**self.plan.after, "vocab": self.plan.before["vocab"]}
        return replace(self, plan=self.plan.model_copy(update={"vocab": None, "after": after}))


class Repaired(Protocol):
    """New weights, by tensor name in the dense model, and the errors before and after."""

    solutions: Solutions

    def __call__(self, name: str, kept: Tensor) -> Tensor:
        """The tensor to write for the dense model's tensor `name`; `kept` is its kept part."""
        ...


def reads_grams(config: PruneConfig) -> bool:
    """Whether a prune reads Gram matrices; raises UserError for an unknown repair method."""
    return config.repair and bool(plugins.load(REPAIR, config.repair_method).GRAMS)
