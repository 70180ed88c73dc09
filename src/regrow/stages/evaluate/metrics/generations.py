"""Greedy answers to a few prompts, to be read."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from regrow.data.documents import chat_prompt_ids
from regrow.runtime.progress import say
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult


def measure(subject: EvalModel, context: Context) -> MetricResult:
    """Each prompt's continuation: as a user's turn of the chat template, if there is one."""
    config = context.config
    if config.prompts:
        say(f"evaluate {subject.label}: {len(config.prompts)} generations")
    generations = []
    for prompt in config.prompts:
        ids = prompt_ids(prompt, subject.tokenizer)
        new = subject.continuation(ids, config.new_tokens)
        text = subject.tokenizer.decode(new, skip_special_tokens=True)
        assert isinstance(text, str)
        generations.append({"prompt": prompt, "text": text.strip()})
    return MetricResult(generations=generations)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt's tokens, as the model is meant to be asked."""
    if tokenizer.chat_template:
        return chat_prompt_ids([{"role": "user", "content": prompt}], tokenizer)
    return list(tokenizer(prompt)["input_ids"])
