"""On-policy distillation: training sequences that the student writes while it is trained.

In each step some rows of the batch are replaced: the student continues prompts with its current
weights, and only the tokens that it wrote are scored (GKD; Agarwal et al., 2024, arXiv:2306.13649).
The teacher then scores them like any other text.

Shapes: T tokens of a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.data import Dataset

from regrow.data.documents import Document
from regrow.data.sequences import IGNORED, Packer, Sequences
from regrow.runtime.batch_generator import BatchGenerator

ROW = "row"
"""The key of a sequence's number in a batch."""
PROMPTS_AT_ONCE = 16
"""Prompts that are continued at once, for each sequence of a micro-batch: the KV cache grows with
this number."""


def own_rows(count: int, share: float) -> list[int]:
    """The rows that the student writes: a `share` of `count` rows, spread evenly.

    A smaller count has the first rows of a larger one.
    """
    return [row for row in range(count) if int((row + 1) * share) > int(row * share)]


def text_prompts(
    sequences: Sequences, rows: Sequence[int], prompt_tokens: int, new_tokens: int, prefix: int
) -> list[list[int]]:
    """The prompts in the documents of some packed sequences.

    The prompt of a document whose first tokens are not scored are these tokens. Of plain text it is
    the first `prompt_tokens` tokens of each piece of `prompt_tokens + new_tokens` tokens. Each
    prompt begins with the `prefix` tokens (BOS) with which a document begins.
    """
    prompts = []
    for row in rows:
        packed = sequences[row]
        starts = ((packed["position_ids"] == 0) & packed["real"]).nonzero().flatten()
        end = int(packed["real"].sum())
        for start, stop in pairwise([*starts.tolist(), end]):
            ids = packed["input_ids"][start:stop].tolist()
            scored = (packed["labels"][start:stop] != IGNORED).nonzero().flatten().tolist()
            if scored and scored[0] > prefix + 1:
                prompts.append(ids[: scored[0]])
            else:
                prompts += plain_prompts(ids, prompt_tokens, new_tokens, prefix)
    return prompts


def plain_prompts(
    ids: list[int], prompt_tokens: int, new_tokens: int, prefix: int
) -> Iterator[list[int]]:
    """The first `prompt_tokens` tokens of each piece of a document; shorter rests are left out."""
    for begin in range(prefix, len(ids) - prompt_tokens + 1, prompt_tokens + new_tokens):
        yield ids[:prefix] + ids[begin : begin + prompt_tokens]


def share_out(
    prompts: Sequence[list[int]], rows: Sequence[int], length: int, new_tokens: int
) -> dict[int, list[list[int]]]:
    """The prompts of each row, in order and repeated: as many as fit into a sequence of `length`.

    Every prompt has room for `new_tokens` tokens after it. All of them must fit alone.
    """
    shared: dict[int, list[list[int]]] = {}
    at = 0
    for row in rows:
        room, mine = length, []
        while len(prompt := prompts[at % len(prompts)]) + new_tokens <= room:
            mine.append(prompt)
            room -= len(prompt) + new_tokens
            at += 1
        shared[row] = mine
    return shared


class NumberedSequences(Dataset[dict[str, Tensor]]):
    """Sequences whose items also have their number (`row`) and the `source` of each token."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sequence = self.sequences[index]
        source = sequence.get("source", torch.zeros_like(sequence["input_ids"]))
        return {**sequence, "source": source, ROW: torch.tensor(index)}


@dataclass
class StudentWriter:
    """Writes the rows of the student.

    `prompts` has the prompts of each row. `source` is the number of the loss weights for these
    tokens. `steps` is the number of optimizer steps for which rows are written at once.
    """

    generator: BatchGenerator
    prompts: dict[int, list[list[int]]]
    length: int
    source: int
    steps: int
    prompts_at_once: int
    seconds: float = 0.0
    """Time spent on writing since `seconds` was last set to 0."""

    def __post_init__(self) -> None:
        self.written: dict[int, dict[str, Tensor]] = {}

    def due(self, step: int, save_steps: int) -> bool:
        """Whether rows are written before optimizer step `step` (from 0).

        Each checkpoint begins anew, so that a continued run needs no text of the run before.
        """
        return not self.written or step % save_steps % self.steps == 0

    def rows_ahead(
        self, step: int, save_steps: int, rows_of: Callable[[int], list[int]]
    ) -> list[int]:
        """The rows to write at `step`: until rows are due again. `rows_of` gives a step's rows."""
        end = step + 1
        while end % save_steps % self.steps:
            end += 1
        return [row for each in range(step, end) for row in rows_of(each) if row in self.prompts]

    def write(self, rows: Sequence[int]) -> None:
        """Write these rows with the student's current weights; forgets all others."""
        start = time.monotonic()
        asked = [(f"{row}/{n}", p) for row in rows for n, p in enumerate(self.prompts[row])]
        answers: dict[str, list[int]] = {}
        for batch in _batches(asked, self.prompts_at_once):
            keys, prompts = zip(*batch, strict=True)
            for key, answer in zip(keys, self.generator.answer(prompts, keys), strict=True):
                answers[key] = answer.written
        self.written = {row: self._pack(row, answers) for row in rows}
        self.seconds += time.monotonic() - start

    def replace(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the student's rows in it, and without the rows' numbers."""
        numbers = batch[ROW].tolist()
        batch = {name: value.clone() for name, value in batch.items() if name != ROW}
        for place, row in enumerate(numbers):
            if row in self.prompts:
                for name, value in self.written[row].items():
                    batch[name][place] = value
        return batch

    def _pack(self, row: int, answers: dict[str, list[int]]) -> dict[str, Tensor]:
        packer = Packer(self.length, self.generator.pad, tagged=True)
        for n, prompt in enumerate(self.prompts[row]):
            answer = answers[f"{row}/{n}"]
            scored = [False] * len(prompt) + [True] * len(answer)
            packer.add(Document(prompt + answer, scored, self.source))
        return packer.sequences(1)[0]


def _batches(
    asked: list[tuple[str, list[int]]], size: int
) -> Iterator[list[tuple[str, list[int]]]]:
    """Batches of prompts of similar length, the longest first."""
    by_length = sorted(asked, key=lambda pair: -len(pair[1]))
    for start in range(0, len(by_length), size):
        yield by_length[start : start + size]
