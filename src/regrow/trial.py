"""Cut copies of a model in memory, untrained, scored on text that it was not profiled on."""

from __future__ import annotations

import torch

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.data import DataConfig, build_blocks
from regrow.errors import UserError
from regrow.options import Options
from regrow.plan import Plan
from regrow.stages.prune.cut import cut_model
from regrow.stages.prune.repair import RIDGES, Repair
from regrow.statistics import Profile
from regrow.training.head import head_of
from regrow.training.teacher import final_hidden, mean_loss, scored

TRIAL_BLOCKS = 8


class Trial:
    """A dense model, calibration blocks beyond the profiled ones, and its hidden states there.

    Raises UserError when there are too few blocks.
    """

    @torch.no_grad()
    def __init__(
        self,
        checkpoint: Checkpoint,
        profile: Profile,
        data: DataConfig,
        options: Options,
        num_blocks: int = TRIAL_BLOCKS,
    ) -> None:
        self.checkpoint, self.profile = checkpoint, profile
        used = int(profile.info["samples"])
        wanted = used + num_blocks
        blocks = build_blocks(data, checkpoint.tokenizer(), "calibration", wanted)
        if len(blocks) < wanted:
            raise UserError(
                f"too little calibration text to choose on: {len(blocks)} blocks, of which the "
                f"profile takes {used} and the choice {num_blocks}; lower samples or add text"
            )
        self.batches = list(blocks.select(range(used, wanted)).batches(options.batch_size))
        self.tokens = num_blocks * data.sequence_length
        self.dense = checkpoint.model(torch.bfloat16, options.torch_device())
        self.reference = [final_hidden(self.dense, b)[scored(b)] for b in self.batches]

    @torch.no_grad()
    def kl(
        self, plan: Plan, ridges: tuple[float, ...] | None = RIDGES, share: float = 1.0
    ) -> float:
        """KL(dense ‖ cut) in nats per scored token; repaired with the best of `ridges`, if any.

        On the first `share` of the batches, one at least. Raises UserError for a plan that cuts the
        vocabulary.
        """
        if plan.vocab is not None:
            raise UserError(
                "a model with fewer tokens reads other tokens, and is not compared untrained: "
                "leave vocab_size out here, and cut the vocabulary in a prune of its own"
            )
        family = families.of(self.checkpoint)
        repair = Repair(self.checkpoint, family, self.profile, plan, ridges) if ridges else None
        student = cut_model(self.dense, plan, replace=repair)
        some = slice(max(1, round(share * len(self.batches))))
        head = head_of(self.dense)
        return mean_loss(student, self.batches[some], self.reference[some], head, "forward_kl")
