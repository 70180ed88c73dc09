"""Greedy answers to a few prompts, for manual inspection."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from regrow.data.documents import chat_prompt_ids
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult


def measure(model: EvalModel, context: Context) -> MetricResult:
    """Generate an answer to each prompt, which is a user turn if there is a chat template."""
    config = context.config
    generations = []
    for prompt in config.prompts:
        ids = prompt_ids(prompt, model.tokenizer)
        new = model.continuation(ids, config.new_tokens)
        text = model.tokenizer.decode(new, skip_special_tokens=True)
        assert isinstance(text, str)
        generations.append({"prompt": prompt, "text": text.strip()})
    return MetricResult(generations=generations)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of the prompt, formatted with the chat template if there is one."""
    if tokenizer.chat_template:
        return chat_prompt_ids([{"role": "user", "content": prompt}], tokenizer)
    return list(tokenizer(prompt)["input_ids"])
