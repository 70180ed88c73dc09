"""Greedy answers to a few prompts, to be read."""

from __future__ import annotations

from itertools import chain, islice

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regrow.progress import say
from regrow.stages.evaluate.greedy import decode, prefill
from regrow.stages.evaluate.subject import Context, Measured, Subject


def measure(subject: Subject, context: Context) -> Measured:
    """Each prompt's continuation: as a user's turn of the chat template, if there is one."""
    config = context.config
    if config.prompts:
        say(f"evaluate {subject.label}: {len(config.prompts)} generations")
    generations = []
    for prompt in config.prompts:
        ids = prompt_ids(prompt, subject.tokenizer)
        new = continuation(subject.model, ids, config.new_tokens, _ends(subject))
        text = subject.tokenizer.decode(new, skip_special_tokens=True)
        assert isinstance(text, str)
        generations.append({"prompt": prompt, "text": text.strip()})
    return Measured(generations=generations)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt's tokens, as the model is meant to be asked."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        # The template writes the special tokens itself.
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


def continuation(
    model: PreTrainedModel, ids: list[int], new_tokens: int, ends: set[int]
) -> list[int]:
    """At most `new_tokens` greedy tokens after `ids`, up to and without the first of `ends`."""
    token, cache = prefill(model, torch.tensor([ids], device=model.device))
    found = []
    for new in islice(chain([token], decode(model, token, cache)), new_tokens):
        if new in ends:
            break
        found.append(new)
    return found


def _ends(subject: Subject) -> set[int]:
    generation_config = subject.model.generation_config
    given = generation_config.eos_token_id if generation_config is not None else None
    ids = given if isinstance(given, list) else [given]
    return {i for i in (*ids, subject.tokenizer.eos_token_id) if isinstance(i, int)}
