"""Turns rows into prompts for a model to answer, and a prompt with its answer into a row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from regrow.data.config import DataConfig, Split
from regrow.data.documents import chat_prompt_ids, place_of, read_row, split_of, text_in
from regrow.data.sources import rows
from regrow.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A prompt for a model to answer."""

    messages: list[dict[str, Any]] | None
    """The turns before the answer; None: the model continues `text`."""
    text: str
    split_at: float
    """A number in [0, 1) that decides the split of the row that it comes from."""
    location: str = field(default="", compare=False)
    """The file and row that it comes from, for error messages."""

    @property
    def key(self) -> str:
        """The hash of the turns or the text, as hex."""
        shown = json.dumps([self.messages, self.text], sort_keys=True, default=str)
        return hashlib.sha256(shown.encode()).hexdigest()[:32]

    @property
    def shown(self) -> str:
        """The prompt as one text, for comparisons."""
        if self.messages is None:
            return self.text
        return "\n".join(str(turn["content"] or "") for turn in self.messages)

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The token ids to continue, with BOS first if the tokenizer puts it before any text.

        Raises UserError, which names the row, for turns that the template refuses.
        """
        if self.messages is not None:
            return chat_prompt_ids(self.messages, tokenizer, self.location)
        ids = list(tokenizer(self.text, verbose=False)["input_ids"])
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids

    def answered(self, answer: str) -> dict[str, Any]:
        """A row with the prompt and the answer, in the same split as the prompt's original row."""
        if self.messages is None:
            row: dict[str, Any] = {"prompt": self.text, "completion": answer}
        else:
            row = {"messages": [*self.messages, {"role": "assistant", "content": answer}]}
        return {**row, "split_at": self.split_at, "id": self.key}


def prompts(
    data: DataConfig,
    split: Split | Literal["all"],
    with_template: bool,
    cache: Path | None = None,
) -> Iterator[Prompt]:
    """Yield the prompts of a split, in the sources' order, without the answers in the rows.

    With `with_template` a plain prompt becomes a user's turn; otherwise the model continues it.
    Raises UserError, which names the row, for a row without a prompt or with an empty one.
    """
    for source in data.sources:
        for location, row in rows(source, cache):
            prompt = read_prompt(row, location, data.seed, with_template)
            if split in ("all", split_of("", data, prompt.split_at)):
                yield prompt


def read_prompt(row: dict[str, Any], location: str, seed: int, with_template: bool) -> Prompt:
    """The prompt in a row: the turns before the last answer, `prompt`, or `question`.

    A plain prompt to be continued ends in white space, so that no token spans prompt and answer.
    """
    if "messages" in row:
        passage = read_row(row, location)
        turns, text, place = passage.messages or [], passage.text, passage.split_at
        turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        if not any(str(turn["content"] or "").strip() for turn in turns):
            raise _empty(location)
        return Prompt(turns, "", place_of(text, seed) if place is None else place, location)
    key = next((key for key in ("prompt", "question") if key in row), None)
    if key is None:
        keys = ", ".join(sorted(map(str, row))) or "none"
        raise UserError(
            f"{location}: the row has the keys {keys}, which are no prompt; it needs `messages`, "
            "`prompt` or `question`"
        )
    prompt = text_in(row, key, location)
    if not prompt.strip():
        raise _empty(location)
    pair = ("prompt" in row and "completion" in row) or ("question" in row and "answer" in row)
    passage = read_row(row if pair else {"text": prompt, **row}, location)
    place = place_of(passage.text, seed) if passage.split_at is None else passage.split_at
    if with_template:
        return Prompt([{"role": "user", "content": prompt}], "", place, location)
    return Prompt(None, prompt if prompt[-1].isspace() else prompt + "\n", place, location)


def _empty(location: str) -> UserError:
    return UserError(f"{location}: the prompt is empty; write a prompt, or remove the row")
