"""Cut copies of a model in memory, untrained, scored on text that it was not profiled on."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.data import DataConfig, build_blocks
from regrow.errors import UserError
from regrow.options import Options
from regrow.plan import Plan
from regrow.stages.prune import PruneConfig
from regrow.stages.prune.gather import Sorted
from regrow.stages.prune.stage import repair_by
from regrow.statistics import Profile
from regrow.training.head import head_of
from regrow.training.teacher import final_hidden, mean_loss, scored

TRIAL_BLOCKS = 8
TRIAL_TOKENS = 4096  # of text that a repair may run: enough to rank by


class Trial:
    """A dense model, calibration blocks beyond the profiled ones, and its hidden states there.

    With `order` (see `order_by`) the model's units are sorted, so that cutting it costs little.
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
        order: Plan | None = None,
    ) -> None:
        self.checkpoint, self.profile, self.options = checkpoint, profile, options
        self.batch_size = options.batch_size
        used = int(profile.info["samples"])
        wanted = used + num_blocks
        blocks = build_blocks(data, checkpoint.tokenizer(), "calibration", wanted)
        if len(blocks) < wanted:
            raise UserError(
                f"too little calibration text to choose on: {len(blocks)} blocks, of which the "
                f"profile takes {used} and the choice {num_blocks}; lower samples or add text"
            )
        self.blocks = list(blocks.select(range(used, wanted)).batches(1))
        self.tokens = num_blocks * data.sequence_length
        dense = checkpoint.model(torch.bfloat16, options.torch_device())
        self.dense = Sorted(dense, families.of(checkpoint), order)
        start = time.perf_counter()
        self.reference: list[Tensor] = []
        for batch in self._batches(len(self.blocks)):
            states, mask = final_hidden(dense, batch), scored(batch)
            self.reference += [one[here] for one, here in zip(states, mask, strict=True)]
        self.dense_seconds = time.perf_counter() - start

    def share(self, wanted: float) -> float:
        """The share of the text that is read for a `wanted` one: whole blocks, one at least."""
        return self._count(wanted) / len(self.blocks)

    @torch.no_grad()
    def kl(self, plan: Plan, config: PruneConfig | None = None, share: float = 1.0) -> float:
        """KL(dense ‖ cut) in nats per scored token, on the first `share` of the blocks.

        Repaired as `config` says, on TRIAL_TOKENS at most, if it is given. Raises UserError for a
        plan that cuts the vocabulary.
        """
        if plan.vocab is not None:
            raise UserError(
                "a model with fewer tokens reads other tokens, and is not compared untrained: "
                "leave vocab_size out here, and cut the vocabulary in a prune of its own"
            )
        with tempfile.TemporaryDirectory(prefix="regrow-") as work:
            repaired = None
            if config is not None:
                tokens = min(config.repair_tokens, TRIAL_TOKENS)
                less = config.model_copy(update={"repair_tokens": tokens})
                given = (self.checkpoint, self.profile, plan, less, Path(work), self.options)
                repaired = repair_by(*given)
            student = self.dense.cut(plan, repaired)
        batches, reference = zip(*self.text(share), strict=True)
        head = head_of(self.dense.model)
        return mean_loss(student, batches, reference, head, "forward_kl")

    def text(self, share: float = 1.0) -> list[tuple[dict[str, Tensor], Tensor]]:
        """The first `share` of the batches, each with the dense model's states where it scores."""
        count = self._count(share)
        reference = [torch.cat(self.reference[some]) for some in self._portions(count)]
        return list(zip(self._batches(count), reference, strict=True))

    def model(self, plan: Plan) -> PreTrainedModel:
        """The cut model with weights of its own, as it would be loaded: for timing it."""
        model: PreTrainedModel = self.dense.cut(plan, copied=True)
        return model

    def _count(self, share: float) -> int:
        return max(1, round(share * len(self.blocks)))

    def _portions(self, count: int) -> list[slice]:
        """The first `count` blocks by batches."""
        size = self.batch_size
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _batches(self, count: int) -> list[dict[str, Tensor]]:
        portions = [self.blocks[some] for some in self._portions(count)]
        return [
            {key: torch.cat([one[key] for one in some]) for key in some[0]} for some in portions
        ]
