"""Greedy answers to a few prompts, for manual inspection."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from regrow.data.documents import chat_prompt_ids
from regrow.runtime import distributed
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult

RANKS = "split"


def measure(model: EvalModel, context: Context) -> MetricResult:
    """Generate an answer to each prompt, which is a user turn if there is a chat template."""
    config = context.config
    texts = {}
    for number in distributed.share(range(len(config.prompts))):
        ids = prompt_ids(config.prompts[number], model.tokenizer)
        new = model.continuation(ids, config.new_tokens)
        text = model.tokenizer.decode(new, skip_special_tokens=True)
        assert isinstance(text, str)
        texts[number] = text.strip()
    texts = distributed.merged(texts)
    generations = [{"prompt": p, "text": texts[n]} for n, p in enumerate(config.prompts)]
    return MetricResult(generations=generations)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of the prompt, formatted with the chat template if there is one."""
    if tokenizer.chat_template:
        return chat_prompt_ids([{"role": "user", "content": prompt}], tokenizer)
    return list(tokenizer(prompt)["input_ids"])
