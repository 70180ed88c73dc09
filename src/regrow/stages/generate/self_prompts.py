"""Prompts that the model writes itself, for a distillation without any data.

A chat model continues the beginning of a user's turn, so that it writes what a user might ask
(Magpie; Xu et al., 2024, arXiv:2406.08464). A base model continues an empty text, and its first
line is the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from regrow.data.documents import place_of, prefix_ids
from regrow.data.prompts import Prompt
from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.runtime.batch_generator import Answer, BatchGenerator
from regrow.runtime.progress import progress, say
from regrow.runtime.rows import Rows
from regrow.stages.generate.keep import plain

MARK = "REGROW-USER-TURN"
MOST_TOKENS = 64
"""The maximum number of tokens in a prompt."""
TRIES = 4
"""Attempts for each prompt that is wanted: some are empty, unfinished, or written already."""


def write_prompts(
    rows: Rows, generator: BatchGenerator, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> list[Prompt]:
    """The first `count` distinct prompts that the model writes; process 0 writes them.

    Finished batches are kept in `rows`, so that a killed run continues with the same prompts.
    """
    if distributed.is_main():
        _write(rows, generator, tokenizer, count)
    distributed.wait()
    found = list(_distinct(rows, count, bool(tokenizer.chat_template), seed))
    if not found:
        raise UserError(
            f"self_prompts {count}: the model wrote no prompt in {TRIES * count} attempts: give "
            "prompts as --data, or another model"
        )
    if len(found) < count:
        say(f"generate: the model wrote {len(found)} distinct prompts instead of {count}")
    return found


def _write(
    rows: Rows, generator: BatchGenerator, tokenizer: PreTrainedTokenizerBase, count: int
) -> None:
    start, size = beginning(tokenizer), 32
    template = bool(tokenizer.chat_template)
    with progress("writing prompts", count, "prompts") as counter:
        done = len(rows.read())
        have = sum(1 for _ in _distinct(rows, count, template, 0))
        counter.resume_at(have)
        while have < count and done < TRIES * count:
            keys = [f"self/{done + n}" for n in range(size)]
            answers = generator.answer([start] * size, keys)
            rows.append(
                {"id": key, "prompt": _text(answer, tokenizer, template)}
                for key, answer in zip(keys, answers, strict=True)
            )
            done, before = done + size, have
            have = sum(1 for _ in _distinct(rows, count, template, 0))
            counter.advance(have - before)


def _text(answer: Answer, tokenizer: PreTrainedTokenizerBase, template: bool) -> str:
    """The prompt in what the model wrote; empty if it wrote none."""
    text = str(tokenizer.decode(answer.ids, skip_special_tokens=True)).strip()
    if template:
        return text if answer.finished else ""
    return text.partition("\n")[0].strip() if answer.finished or "\n" in text else ""


def _distinct(rows: Rows, count: int, template: bool, seed: int) -> Iterator[Prompt]:
    known: set[str] = set()
    for row in rows.read().values():
        text = row["prompt"]
        if not text or plain(text) in known or len(known) >= count:
            continue
        known.add(plain(text))
        place = place_of(text, seed)
        if template:
            yield Prompt([{"role": "user", "content": text}], "", place, row["id"])
        else:
            yield Prompt(None, text + "\n", place, row["id"])


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids before a user's first words; for a base model those before any text."""
    if not tokenizer.chat_template:
        start = prefix_ids(tokenizer) or [tokenizer.eos_token_id]
        return [int(i) for i in start if i is not None] or [0]
    turn = [{"role": "user", "content": MARK}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False))
    head, found, _ = text.partition(MARK)
    if not found:
        raise UserError("self_prompts: the chat template shows no user's turn: give --data")
    ids: list[int] = tokenizer(head, add_special_tokens=False)["input_ids"]
    prefix = prefix_ids(tokenizer)
    return ids if ids[: len(prefix)] == prefix else prefix + ids
