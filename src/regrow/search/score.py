"""Cut copies of a model in memory, scored untrained on text that was not profiled.

A search scores every shape on a little text, the best on more, and the last ones on all of it.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.cost import file_bytes, ram_bytes
from regrow.data import DataConfig
from regrow.data.sequences import build_sequences
from regrow.errors import UserError
from regrow.families import Family
from regrow.plan import Plan
from regrow.profile_folder import Profile
from regrow.pruning.config import PruneConfig
from regrow.pruning.prune import repair_by
from regrow.pruning.sorted_model import SortedModel
from regrow.runtime.progress import progress, say
from regrow.search.shapes import HANDFUL, Shape
from regrow.training.head import head_of
from regrow.training.model_check import check_model
from regrow.training.teacher import final_hidden, mean_loss, scored

SCORED_SEQUENCES = 8
SCORER_REPAIR_TOKENS = 4096  # of text that a repair may run: enough to rank by


class CutScorer:
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
        num_sequences: int = SCORED_SEQUENCES,
        order: Plan | None = None,
    ) -> None:
        self.checkpoint, self.profile, self.options = checkpoint, profile, options
        self.batch_size = options.batch_size
        used = int(profile.info["samples"])
        wanted = used + num_sequences
        sequences = build_sequences(data, checkpoint.tokenizer(), "calibration", wanted, checkpoint)
        if len(sequences) < wanted:
            raise UserError(
                f"too little calibration text to choose on: {len(sequences)} blocks, of which the "
                f"profile takes {used} and the choice {num_sequences}; lower samples or add text"
            )
        self.sequences = list(sequences.select(range(used, wanted)).batches(1))
        self.tokens = num_sequences * data.sequence_length
        dense = checkpoint.model(torch.bfloat16, options.torch_device())
        check_model(dense)
        self.dense = SortedModel(dense, families.of(checkpoint), order)
        start = time.perf_counter()
        self.reference: list[Tensor] = []
        for batch in self._batches(len(self.sequences)):
            states, mask = final_hidden(dense, batch), scored(batch)
            self.reference += [one[here] for one, here in zip(states, mask, strict=True)]
        self.dense_seconds = time.perf_counter() - start

    def share(self, wanted: float) -> float:
        """The share of the text that is read for a `wanted` one: whole blocks, one at least."""
        return self._count(wanted) / len(self.sequences)

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
                tokens = min(config.repair_tokens, SCORER_REPAIR_TOKENS)
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
        return max(1, round(share * len(self.sequences)))

    def _portions(self, count: int) -> list[slice]:
        """The first `count` blocks by batches."""
        size = self.batch_size
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _batches(self, count: int) -> list[dict[str, Tensor]]:
        portions = [self.sequences[some] for some in self._portions(count)]
        return [
            {key: torch.cat([one[key] for one in some]) for key in some[0]} for some in portions
        ]


MANY_SEQUENCES = 8 * SCORED_SEQUENCES  # of text, for more than a handful
SECOND = 40  # shapes in the second round at most

Row = dict[str, Any]


def rounds_for(count: int) -> list[tuple[float, int]]:
    """(share of the text, survivors) of each round; a handful is scored on all of it at once.

    Of 200 shapes all are read 1/32 of the text, 40 of them 1/8 and 8 all of it: 19.25 evaluations
    of a shape, of which none costs more than one of the dense model.
    """
    if count <= HANDFUL:
        return [(1.0, count)]
    second = max(HANDFUL, min(SECOND, count // 5))
    first = 1 / 32 if count <= 200 else 1 / 64
    return [(first, second), (1 / 8, HANDFUL), (1.0, HANDFUL)]


def sequences_for(count: int) -> int:
    """Blocks of text to score `count` shapes on."""
    return SCORED_SEQUENCES if count <= HANDFUL else MANY_SEQUENCES


def passes_for(count: int) -> float:
    """How often the text is read in all, in evaluations of one shape on all of it."""
    if count <= 1:
        return 0.0
    entered, passes = count, 1.0  # the dense model itself
    for share, survivors in rounds_for(count):
        entered, passes = survivors, passes + share * entered
    return passes


def row_of(shape: Shape, family: Family, config: dict[str, Any], prune: PruneConfig) -> Row:
    """What is known of a shape before it was tried; `kl` is None until then."""
    return {
        "name": shape.name,
        "sizes": shape.sizes,
        "parameters": shape.parameters,
        "keep": shape.parameters / family.count(config),
        "format": prune.format,
        "bytes": file_bytes(family, config, prune.format, shape.sizes),
        "ram": ram_bytes(family, config, prune.format, prune.context_length, shape.sizes),
        "kl": None,
        "round": 0,
        "chosen": False,
    }


class Rounds:
    """Scores rows by their plans, and keeps count of what it costs."""

    def __init__(self, trial: CutScorer, config: PruneConfig) -> None:
        self.trial, self.config = trial, config
        self.cost = 1.0  # the dense model has read the text once
        self.seconds = trial.dense_seconds

    def score(self, rows: list[Row], number: int, of: int, share: float) -> list[Row]:
        """The rows with their KL on a share of the text, the best first; repaired in the last."""
        before = [row["kl"] for row in rows]
        how = self.config if number == of else None
        with progress(f"search, round {number} of {of}", len(rows), "shapes") as counter:
            for row in rows:
                row |= {"kl": self.trial.kl(row["plan"], how, share), "round": number}
                self.cost += self.trial.share(share) * row["keep"]
                counter.advance(1, f"KL {row['kl']:.3f}")
        self.seconds += counter.seconds()
        if number > 1:
            agreement = rank_correlation(before, [row["kl"] for row in rows])
            say(f"search: rank correlation of rounds {number - 1} and {number}: {agreement:.2f}")
        return sorted(rows, key=cost_of)

    def told(self) -> str:
        """The cost in words."""
        clock = self.seconds / self.trial.dense_seconds
        return (
            f"cost {self.cost:.1f} dense evaluations of {self.trial.tokens:,} tokens (by the "
            f"clock, with cutting and repair, {clock:.1f})"
        )


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's: the correlation of the ranks. 1 for fewer than two."""
    if len(one) < 2:
        return 1.0
    ranks = torch.tensor([one, other]).double().argsort(dim=1).argsort(dim=1)
    return float(torch.corrcoef(ranks.double())[0, 1])


def cost_of(row: Row) -> float:
    """What rows are sorted by: the KL, with what is no number at the end."""
    return float(row["kl"]) if math.isfinite(row["kl"]) else math.inf
