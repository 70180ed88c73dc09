"""Score cut copies of a model in memory, without training, on text that was not profiled.

A search scores every shape on a small part of the text, the best shapes on a larger part, and the
last few on all of it. Only those few are repaired before their last score, because a repair takes
several times as long as a score.
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
from regrow.errors import UserError
from regrow.families import Family
from regrow.plan import Plan
from regrow.profile_folder import Profile
from regrow.pruning.config import PLAIN, PruneConfig
from regrow.pruning.prune import repair_by, repair_setup
from regrow.pruning.sorted_model import SortedModel
from regrow.quantization.fake_quantize import round_weights
from regrow.quantization.formats import Scheme, find_scheme
from regrow.runtime import distributed
from regrow.runtime.precision import half
from regrow.runtime.progress import progress, say
from regrow.search.shapes import HANDFUL, Shape
from regrow.training.head import head_of
from regrow.training.model_check import check_model
from regrow.training.teacher import final_hidden, mean_loss, scored
from regrow.training.text import text_for

SCORED_SEQUENCES = 8
SCORER_REPAIR_TOKENS = 4096  # tokens for the repair of a finalist
FINALISTS = 3  # shapes that are repaired before their last score


class CutScorer:
    """A dense model, calibration sequences after the profiled ones, and their hidden states.

    With `order` (see `order_by`) the model's units are sorted, which makes cuts cheap.
    Raises UserError when there are too few sequences.
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
        sequences = text_for(
            [checkpoint.config], data, checkpoint.tokenizer(), "calibration", wanted, checkpoint
        )
        if len(sequences) < wanted:
            raise UserError(
                f"too little calibration text to choose on: {len(sequences)} sequences, of which "
                f"the profile takes {used} and the choice {num_sequences}; lower samples or add "
                "text"
            )
        self.sequences = list(sequences.select(range(used, wanted)).batches(1))
        self.tokens = num_sequences * data.sequence_length
        device = options.torch_device()
        dense = checkpoint.model(half(device), device)
        check_model(dense)
        self.dense = SortedModel(dense, families.of(checkpoint), order)
        start = time.perf_counter()
        self.reference: list[Tensor] = []
        for batch in self._batches(len(self.sequences)):
            states, mask = final_hidden(dense, batch), scored(batch)
            self.reference += [one[here] for one, here in zip(states, mask, strict=True)]
        self.dense_seconds = time.perf_counter() - start

    def share(self, wanted: float) -> float:
        """The `wanted` share of the text, rounded to whole sequences, at least one."""
        return self._count(wanted) / len(self.sequences)

    @torch.no_grad()
    def kl(
        self,
        plan: Plan,
        config: PruneConfig | None = None,
        share: float = 1.0,
        scheme: Scheme | None = None,
    ) -> float:
        """KL(dense ‖ cut) in nats per scored token, on the first `share` of the sequences.

        With a `config`, the cut model is repaired by its settings, on at most 4,096 tokens. With a
        `scheme`, its weights are rounded to the grids of that scheme. Raises UserError for a plan
        that cuts the vocabulary.
        """
        if plan.vocab is not None:
            raise UserError(
                "a model with a smaller vocabulary reads other tokens and cannot be compared "
                "untrained: leave vocab_size out here, and cut the vocabulary in its own prune"
            )
        with tempfile.TemporaryDirectory(prefix="regrow-") as work:
            repaired = None
            if config is not None and plan.after != plan.before:
                tokens = min(config.repair_tokens, SCORER_REPAIR_TOKENS)
                less = config.model_copy(update={"repair_tokens": tokens})
                given = (self.checkpoint, self.profile, plan, less, Path(work), self.options)
                repaired = repair_by(repair_setup(*given), less)
            student = self.dense.cut(plan, repaired)
        if scheme is not None:
            round_weights(student, scheme)
        batches, reference = zip(*self.text(share), strict=True)
        head = head_of(self.dense.model)
        return mean_loss(student, batches, reference, head, "forward_kl")

    def text(self, share: float = 1.0) -> list[tuple[dict[str, Tensor], Tensor]]:
        """The first `share` of the batches, with the dense model's states at the scored tokens."""
        count = self._count(share)
        reference = [torch.cat(self.reference[some]) for some in self._portions(count)]
        return list(zip(self._batches(count), reference, strict=True))

    def model(self, plan: Plan) -> PreTrainedModel:
        """The cut model with its own copy of the weights, as if loaded from disk, for timing."""
        model: PreTrainedModel = self.dense.cut(plan, copied=True)
        return model

    def _count(self, share: float) -> int:
        return max(1, round(share * len(self.sequences)))

    def _portions(self, count: int) -> list[slice]:
        """The slices of the batches of the first `count` sequences."""
        size = self.batch_size
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _batches(self, count: int) -> list[dict[str, Tensor]]:
        portions = [self.sequences[some] for some in self._portions(count)]
        return [
            {key: torch.cat([one[key] for one in some]) for key in some[0]} for some in portions
        ]


MANY_SEQUENCES = 8 * SCORED_SEQUENCES  # to score more than HANDFUL shapes
SECOND = 40  # maximum number of shapes in the second round

Row = dict[str, Any]


def finalists_for(config: PruneConfig) -> int:
    """The number of shapes that are repaired before their last score; 0 without repair."""
    if not config.repair:
        return 0
    return max(FINALISTS, config.halving_shapes if config.halving_tokens else 0)


def rounds_for(count: int, finalists: int = 0) -> list[tuple[float, int]]:
    """(share of the text, survivors) of each round; up to 8 shapes need a single round on all text.

    For 200 shapes, all are scored on 1/32 of the text, 40 on 1/8 and 8 on all of it: 19.25
    evaluations, each at most as expensive as one of the dense model. With `finalists` there is one
    more round, in which that many shapes are repaired.
    """
    rounds = [(1.0, count)]
    if count > HANDFUL:
        second = max(HANDFUL, min(SECOND, count // 5))
        first = 1 / 32 if count <= 200 else 1 / 64
        rounds = [(first, second), (1 / 8, HANDFUL), (1.0, HANDFUL)]
    if finalists:
        finalists = min(finalists, rounds[-1][1])
        rounds[-1:] = [(1.0, finalists), (1.0, finalists)]
    return rounds


def sequences_for(count: int) -> int:
    """The number of sequences on which `count` shapes are scored."""
    return SCORED_SEQUENCES if count <= HANDFUL else MANY_SEQUENCES


def passes_for(count: int, finalists: int = 0) -> float:
    """The total cost of a search, in evaluations of one shape on the whole text."""
    if count <= 1:
        return 0.0
    entered, passes = count, 1.0  # the dense model itself
    for share, survivors in rounds_for(count, finalists):
        entered, passes = survivors, passes + share * entered
    return passes


def row_of(shape: Shape, family: Family, config: dict[str, Any], prune: PruneConfig) -> Row:
    """The table row of a shape before it is scored; `kl` is None."""
    format = shape.format or prune.format
    return {
        "name": shape.name,
        "sizes": shape.sizes,
        "parameters": shape.parameters,
        "keep": shape.parameters / family.count(config),
        "format": format,
        "bytes": file_bytes(family, config, format, shape.sizes),
        "ram": ram_bytes(family, config, format, prune.context_length, shape.sizes),
        "kl": None,
        "round": 0,
        "chosen": False,
    }


class Rounds:
    """Scores rows by their plans, and sums the cost."""

    def __init__(self, scorer: CutScorer, config: PruneConfig) -> None:
        self.scorer, self.config = scorer, config
        self.cost = 1.0  # the dense model has read the text once
        self.seconds = scorer.dense_seconds

    def score(
        self, rows: list[Row], number: int, of: int, share: float, repair: bool = False
    ) -> list[Row]:
        """The rows with their KL on a share of the text, the best first.

        With `repair`, the KL is that of the repaired model if it is lower than in the previous
        round, on the same text: a repair that does not help is not applied. The processes of a job
        share the rows.
        """
        before = [row["kl"] for row in rows]
        config = self.config if repair else None
        mine = distributed.share(range(len(rows)))
        found: dict[int, float] = {}
        with progress(f"search, round {number} of {of}", len(mine), "shapes") as counter:
            for place in mine:
                row = rows[place]
                scheme = scheme_of(row, self.config)
                found[place] = self.scorer.kl(row["plan"], config, share, scheme)
                counter.advance(1, f"KL {found[place]:.3f}")
            found = distributed.merged(found)
        for place, (row, earlier) in enumerate(zip(rows, before, strict=True)):
            kl = found[place]
            row |= {"kl": _lower(kl, earlier) if repair else kl, "round": number}
            self.cost += self.scorer.share(share) * row["keep"]
        self.seconds += counter.seconds()
        if number > 1:
            agreement = rank_correlation(before, [row["kl"] for row in rows])
            say(f"search: rank correlation of rounds {number - 1} and {number}: {agreement:.2f}")
        return sorted(rows, key=cost_of)

    def summary(self) -> str:
        """The cost as a sentence."""
        clock = self.seconds / self.scorer.dense_seconds
        return (
            f"cost {self.cost:.1f} dense evaluations of {self.scorer.tokens:,} tokens (by the "
            f"clock, with cutting and repair, {clock:.1f})"
        )


def scheme_of(row: Row, config: PruneConfig) -> Scheme | None:
    """The scheme to which a row's weights are rounded, if the search chooses the format."""
    chosen = config.formats and row["format"] != PLAIN
    return find_scheme(row["format"]) if chosen else None


def _lower(kl: float, other: float) -> float:
    """The lower of two KLs; NaN counts as the higher one."""
    return kl if kl < other or not math.isfinite(other) else other


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's rank correlation; 1 for fewer than two values."""
    if len(one) < 2:
        return 1.0
    ranks = torch.tensor([one, other]).double().argsort(dim=1).argsort(dim=1)
    return float(torch.corrcoef(ranks.double())[0, 1])


def cost_of(row: Row) -> float:
    """The sort key of a row: its KL; a row whose KL is NaN comes last."""
    return float(row["kl"]) if math.isfinite(row["kl"]) else math.inf
