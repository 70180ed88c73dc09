"""Renders conversations with a tokenizer's chat template and marks the assistant's tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from regrow.errors import UserError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Messages = list[dict[str, Any]]


def render(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, location: str = ""
) -> tuple[list[int], list[bool]]:
    """The token ids of the rendered conversation, and for each whether the assistant produced it.

    A template with {% generation %} marks the assistant's tokens itself. Otherwise a turn begins
    after its generation prompt (`add_generation_prompt`). It ends where the conversation rendered
    up to and including that turn ends, without white space after the turn's end mark.
    Raises UserError, which names the row by `location`, if there is no chat template or if the
    template does not accept the turns.
    """
    _require_template(tokenizer, location)
    if GENERATION.search(tokenizer.get_chat_template()):
        return _marked(messages, tokenizer, location)
    text = _text(messages, tokenizer, location)
    spans = _spans(messages, text, tokenizer, location)
    if not tokenizer.is_fast:
        raise UserError(
            "marking the assistant's tokens needs a fast tokenizer or a chat template with "
            "{% generation %} marks; this tokenizer has neither"
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    scored = [
        any(start < end_of and end > start_of for start_of, end_of in spans)
        for start, end in encoding["offset_mapping"]
    ]
    return list(encoding["input_ids"]), scored


def prompt_text(messages: Messages, tokenizer: PreTrainedTokenizerBase, location: str = "") -> str:
    """Render the conversation up to the assistant's answer; raises UserError like `render`."""
    _require_template(tokenizer, location)
    return _text(messages, tokenizer, location, prompt=True)


def _require_template(tokenizer: PreTrainedTokenizerBase, location: str) -> None:
    if not tokenizer.chat_template:
        raise _error(
            location,
            "the tokenizer has no chat template, which rows with `messages` need; use an "
            "instruction-tuned model's tokenizer, or rows with `prompt` and `completion`",
        )


def _error(location: str, text: str) -> UserError:
    return UserError(f"{location}: {text}" if location else text)


@contextmanager
def _refusals(messages: Messages, location: str) -> Iterator[None]:
    """Convert a template's errors, which include Python's built-in errors, into a UserError."""
    try:
        yield
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
        roles = ", ".join(str(turn["role"]) for turn in messages)
        text = f"the chat template refuses turns by {roles}: {error}"
        raise _error(location, text) from None


def _marked(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, location: str
) -> tuple[list[int], list[bool]]:
    with _refusals(messages, location):
        encoding: Any = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
    return list(encoding["input_ids"]), [bool(mark) for mark in encoding["assistant_masks"]]


def _text(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, location: str, prompt: bool = False
) -> str:
    with _refusals(messages, location):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text


def _spans(
    messages: Messages, text: str, tokenizer: PreTrainedTokenizerBase, location: str
) -> list[tuple[int, int]]:
    """The start and end of each assistant turn in the rendered `text`, as character offsets."""
    spans = []
    for at, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = _text(messages[:at], tokenizer, location, prompt=True) if at else ""
        start = len(_common(before, text))
        through = _text(messages[: at + 1], tokenizer, location)
        if text.startswith(through):
            end = start + len(text[start : len(through)].rstrip())
        else:
            end = _end_of_content(turn, text, start, tokenizer, location)
        spans.append((start, end))
    return spans


def _end_of_content(
    turn: dict[str, Any],
    text: str,
    start: int,
    tokenizer: PreTrainedTokenizerBase,
    location: str,
) -> int:
    """The end of a turn whose rendering depends on later turns, such as when thoughts are dropped.

    Returns a character offset in `text`.
    """
    content = (turn["content"] or "").rpartition("</think>")[2].strip()
    at = text.find(content, start)
    if at < 0 or not content:
        raise _error(
            location,
            "the chat template changes the text of the assistant; give the tokenizer a template "
            "with {% generation %} marks, or use rows with a single answer",
        )
    end = at + len(content)
    marks = [mark for mark in tokenizer.all_special_tokens if text.startswith(mark, end)]
    return end + max(map(len, marks), default=0)


def _common(a: str, b: str) -> str:
    for at, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return a[:at]
    return a[: len(b)]
