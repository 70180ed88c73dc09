"""Answers a batch of prompts with transformers' generate.

The drawn tokens do not depend on the batch: each prompt has its own random numbers.

Shapes: B prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from regrow.runtime.precision import widest


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen."""

    max_new_tokens: int
    """The maximum number of tokens in an answer."""
    temperature: float = 1.0
    """The temperature, by which the logits are divided before a draw."""
    top_p: float = 1.0
    """Draw from the smallest set of most likely tokens whose total probability reaches this."""
    seed: int = 0
    """Seed of the draws."""
    greedy: bool = False
    """Use the most likely token instead of drawing one."""
    vocab_size: int | None = None
    """Only ids below this number are used; None allows all rows of the output head."""
    top_logprobs: int = 0
    """The number of most likely tokens to keep for each position of an answer."""


@dataclass(frozen=True)
class Scored:
    """A token of an answer with its log-probability, and the most likely tokens at its place.

    The log-probabilities are those of the model over the ids that may be used, before temperature
    and top_p.
    """

    id: int
    logprob: float
    top: list[tuple[int, float]]
    """Ids with their log-probabilities, the most likely one first."""


class OnlyBelow(LogitsProcessor):
    """Masks the ids from `vocab_size` on, which are rows of the output head without a token."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Return scores [B, V] that are −∞ from `vocab_size` on."""
        scores = scores.clone()
        scores[:, self.vocab_size :] = -torch.inf
        return scores


class TopLogprobs(LogitsProcessor):
    """Keeps the log-probabilities [B] of the tokens and the K most likely ids at each position."""

    def __init__(self, count: int) -> None:
        self.count, self.steps = count, list[tuple[Tensor, Tensor, Tensor]]()
        self.log_p_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Return the scores unchanged."""
        self.took(input_ids[:, -1])
        self.log_p_BV = scores.float().log_softmax(-1)
        return scores

    def took(self, ids_B: Tensor) -> None:
        """Note that these ids came after the last call."""
        if self.log_p_BV is not None:
            own_B = self.log_p_BV.gather(-1, ids_B[:, None]).squeeze(-1)
            values_BK, ids_BK = self.log_p_BV.topk(self.count)
            self.steps.append((own_B.cpu(), values_BK.cpu(), ids_BK.cpu()))
        self.log_p_BV = None

    def of(self, row: int, ids: list[int]) -> list[Scored]:
        """The tokens of one answer."""
        found = []
        for token, (own_B, values_BK, ids_BK) in zip(ids, self.steps, strict=False):
            top = zip(ids_BK[row].tolist(), values_BK[row].tolist(), strict=True)
            found.append(Scored(token, float(own_B[row]), list(top)))
        return found


class Sampler(LogitsProcessor):
    """Draws one id per row from the top_p part of softmax(logits / temperature); masks the others.

    A draw inverts the cumulative distribution at one uniform number per row and token. The top_p
    part is the smallest set of most likely ids whose total probability reaches top_p (Holtzman et
    al., 2020, arXiv:1904.09751).
    """

    def __init__(self, keys: Sequence[str], sampling: Sampling) -> None:
        self.draws = [Random(f"{sampling.seed}/{key}") for key in keys]
        self.sampling = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Return scores [B, V] that are −∞ except at the drawn ids."""
        sampling = self.sampling
        uniform_B = torch.tensor([draw.random() for draw in self.draws], dtype=torch.float64)
        logits_BV = scores[:, : sampling.vocab_size].float() / sampling.temperature
        chosen_B = draw_ids(logits_BV, sampling.top_p, uniform_B)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen_B[:, None], 0.0)


def draw_ids(logits_BV: Tensor, top_p: float, uniform_B: Tensor) -> Tensor:
    """The id [B] at which the cumulative distribution exceeds each uniform number in [0, 1)."""
    probability_BV = logits_BV.softmax(-1)
    order_BV = None
    if top_p < 1:
        probability_BV, order_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = probability_BV.cumsum(-1) - probability_BV
        probability_BV = probability_BV.masked_fill(before_BV >= top_p, 0.0)
    # float64 if the device has it: in float32 a sum over a vocabulary has an error of 1e-6.
    wide = widest(logits_BV.device)
    sum_BV = probability_BV.cumsum(-1, dtype=wide)
    at_B1 = uniform_B.to(wide).to(sum_BV.device)[:, None] * sum_BV[:, -1:]
    last_B1 = (probability_BV > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    place_B1 = torch.searchsorted(sum_BV, at_B1, right=True).minimum(last_B1)
    ids_B1 = place_B1 if order_BV is None else order_BV.gather(-1, place_B1)
    return ids_B1.squeeze(-1)


@dataclass(frozen=True)
class Answer:
    """A model's answer, without its end mark."""

    ids: list[int]
    finished: bool
    """Whether the model ended the answer; otherwise max_new_tokens cut it off."""
    end: int | None = None
    """The end mark that the model wrote, if it did."""
    scored: list[Scored] | None = None
    """Each token of the answer and its end mark, if log-probabilities were asked for."""

    @property
    def written(self) -> list[int]:
        """The answer with its end mark."""
        return self.ids if self.end is None else [*self.ids, self.end]


class BatchGenerator:
    """Lets a model answer prompts in batches.

    Uses only the end marks of the generation settings in the model's folder, plus the tokenizer's
    end mark. The model may be in training: its own forward method and its settings are put back
    after each batch.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
    ) -> None:
        self.model, self.sampling = model, sampling
        self.ends = end_ids(model, tokenizer)
        pad, rows = tokenizer.pad_token_id, model.get_input_embeddings().num_embeddings
        self.pad = int(pad) if pad is not None and pad < rows else next(iter(self.ends), 0)
        self.settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # the sampler leaves only one id
            eos_token_id=self.ends or None,
            pad_token_id=self.pad,
        )

    @torch.inference_mode()
    def answer(self, prompts: Sequence[list[int]], keys: Sequence[str]) -> list[Answer]:
        """Answer prompts of any lengths, padded on the left; `keys` seed their draws."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device, kept = self.model.device, None
        if self.sampling.top_logprobs:
            kept = TopLogprobs(self.sampling.top_logprobs)
        with stock(self.model, self.settings):
            tokens = self.model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=self._processors(keys, kept),
            )
        answers = [self._cut(row) for row in tokens[:, width:].tolist()]
        if kept is None:
            return answers
        kept.took(tokens[:, -1])
        return [
            replace(answer, scored=kept.of(row, answer.written))
            for row, answer in enumerate(answers)
        ]

    def _processors(self, keys: Sequence[str], kept: TopLogprobs | None) -> LogitsProcessorList:
        size, processors = self.sampling.vocab_size, list[LogitsProcessor]()
        if size is not None:
            processors.append(OnlyBelow(size))
        if kept is not None:
            processors.append(kept)
        if not self.sampling.greedy:
            processors.append(Sampler(keys, self.sampling))
        return LogitsProcessorList(processors)

    def _cut(self, ids: list[int]) -> Answer:
        end = next((at for at, token in enumerate(ids) if token in self.ends), None)
        return Answer(ids, False) if end is None else Answer(ids[:end], True, ids[end])


@contextmanager
def stock(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Let `model` run as its class defines it, in eval mode and with these generation settings."""
    before, training = model.generation_config, model.training
    forward = vars(model).pop("forward", None)
    model.generation_config = settings
    model.eval()
    try:
        yield
    finally:
        model.generation_config = before
        model.train(training)
        if forward is not None:
            model.forward = forward  # type: ignore[method-assign]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: those in the model's folder and the tokenizer's."""
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({int(i) for i in (*ends, tokenizer.eos_token_id) if i is not None})
