"""A batch of prompts → the model's answers, by transformers' generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from regrow.stages.generate.config import GenerateConfig
from regrow.stages.generate.sampling import Sampler


@dataclass(frozen=True)
class Answer:
    """What the model said, its end mark left out."""

    ids: list[int]
    finished: bool
    """Whether the model ended it, and not max_new_tokens."""


class Answerer:
    """A model that is asked in batches; settings that its folder has for generation do not count.

    Only its end marks do, beside the tokenizer's.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerateConfig
    ) -> None:
        self.model, self.config = model, config
        self.ends = end_ids(model, tokenizer)
        pad = tokenizer.pad_token_id
        self.pad = int(pad) if pad is not None else next(iter(self.ends), 0)
        model.generation_config = GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            do_sample=False,  # the sampler leaves one id to take
            eos_token_id=self.ends or None,
            pad_token_id=self.pad,
        )

    @torch.inference_mode()
    def answer(self, prompts: Sequence[list[int]], keys: Sequence[str]) -> list[Answer]:
        """The answers to prompts of any lengths, padded on the left; `keys` seed their draws."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.model.device
        found = self.model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=self._processors(keys),
        )
        return [self._cut(row) for row in found[:, width:].tolist()]

    def _processors(self, keys: Sequence[str]) -> LogitsProcessorList:
        given = self.config
        if given.greedy:
            return LogitsProcessorList()
        return LogitsProcessorList([Sampler(keys, given.seed, given.temperature, given.top_p)])

    def _cut(self, ids: list[int]) -> Answer:
        end = next((at for at, token in enumerate(ids) if token in self.ends), None)
        return Answer(ids if end is None else ids[:end], end is not None)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: those of the model's folder and the tokenizer's own."""
    given = model.generation_config.eos_token_id  # type: ignore[union-attr]
    found = given if isinstance(given, list) else [given]
    return sorted({int(i) for i in (*found, tokenizer.eos_token_id) if i is not None})
