"""Turns rows into passages of a split, and passages into token ids with a mask of scored tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from regrow.data import chat
from regrow.data.config import DataConfig, Split
from regrow.data.wikitext import sections
from regrow.errors import UserError

ALLOWED = "`text`, `prompt` + `completion`, `question` + `answer`, or `messages`"
PIECE = 8_000
"""Section length of a long document, in characters, or 8 · sequence_length if that is more."""
DEEPEST = 64
"""The maximum nesting depth of lists and objects in a turn."""


@dataclass(frozen=True)
class Passage:
    """A document's text before it is tokenized."""

    text: str
    """The text, or the JSON of `messages`, which does not depend on the tokenizer."""
    prompt: int = 0
    """The number of leading characters that are a prompt, which is not scored."""
    ends: bool = True
    """Whether the document ends with this passage; it then gets the end-of-sequence token."""
    messages: list[dict[str, Any]] | None = None
    """The turns, for the chat template to render."""
    split_at: float | None = None
    """A number in [0, 1) that decides the split; None: `place_of` computes it from the text."""
    location: str = field(default="", compare=False)
    """The file and row that it comes from, for error messages."""

    @property
    def characters(self) -> int:
        """The length of its text."""
        return len(self.text)


@dataclass(frozen=True)
class Document:
    """The token ids of a document, and for each whether it is scored."""

    ids: list[int]
    scored: list[bool]
    source: int = 0
    """The number of its source."""


def read_row(row: dict[str, Any], location: str) -> Passage:
    """The passage in a row: its `messages` if present, else a prompt-answer pair, else its `text`.

    A `split_at` in [0, 1), which generated rows have, assigns the passage to the split of the row
    that the prompt came from. Raises UserError, which names `location`, for a row without these
    keys or with values that are not text.
    """
    place = row.get("split_at")
    valid = isinstance(place, float) and 0 <= place < 1
    return replace(_passage(row, location), split_at=place if valid else None, location=location)


def _passage(row: dict[str, Any], location: str) -> Passage:
    if "messages" in row:
        return _conversation(row["messages"], location)
    if "prompt" in row and "completion" in row:
        prompt, answer = text_in(row, "prompt", location), text_in(row, "completion", location)
        separated = not prompt or prompt[-1].isspace() or answer[:1].isspace()
        prompt += "" if separated else " "
        return Passage(prompt + answer, prompt=len(prompt))
    if "question" in row and "answer" in row:
        prompt = text_in(row, "question", location) + "\n"
        return Passage(prompt + text_in(row, "answer", location), prompt=len(prompt))
    if "text" in row:
        return Passage(text_in(row, "text", location))
    keys = ", ".join(sorted(map(str, row))) or "none"
    raise UserError(f"{location}: the row has the keys {keys}; it needs {ALLOWED}")


def place_of(text: str, seed: int) -> float:
    """u = blake2b(text, keyed by the seed) / 2^64 in [0, 1), which decides a document's split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(text: str, data: DataConfig, place: float | None = None) -> Split:
    """The split of the document `text`. It depends only on the text, so copies share a split.

    u is `place`, or `place_of` the text if `place` is None. Documents with u < `heldout_fraction`
    are held out, the next fractions are calibration and validation, and the rest is train.
    """
    u = place_of(text, data.seed) if place is None else place
    if u < data.heldout_fraction:
        return "heldout"
    if u < data.heldout_fraction + data.calibration_fraction:
        return "calibration"
    u -= data.heldout_fraction + data.calibration_fraction
    return "validation" if u < data.validation_fraction else "train"


def piece_size(sequence_length: int) -> int:
    """The section length of a long document, in characters."""
    return max(PIECE, 8 * sequence_length)


def pieces(passage: Passage, size: int) -> Iterator[Passage]:
    """Cut plain text of more than 2 · `size` characters into sections of about `size` characters.

    Other passages are not changed. A whole novel as one document would fill hundreds of consecutive
    sequences, but its sections can be shuffled. Only the last section ends the document.
    """
    if passage.prompt or passage.messages is not None or len(passage.text) <= 2 * size:
        yield passage
        return
    text, step = passage.text, 1 << 16
    parts = list(sections((text[at : at + step] for at in range(0, len(text), step)), size))
    for number, part in enumerate(parts, start=1):
        yield replace(passage, text=part, ends=number == len(parts))


def tokenize(passages: Sequence[Passage], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Tokenize the passages, in order. Plain passages are tokenized in one call, in parallel.

    A document begins with the tokens (BOS) that the tokenizer puts before any text; these are not
    scored. Any other token is scored if it contains a character after the prompt. The
    end-of-sequence token, which follows each passage that `ends`, is scored too. In a conversation
    only the assistant's tokens are scored.
    """
    plain = [passage for passage in passages if passage.messages is None]
    encoded = iter(_encode(plain, tokenizer))
    eos, prefix = tokenizer.eos_token_id, prefix_ids(tokenizer)
    documents = []
    for passage in passages:
        if passage.messages is not None:
            ids, scored = chat.render(passage.messages, tokenizer, passage.location)
            missing = [] if ids[: len(prefix)] == prefix else prefix
            documents.append(Document(missing + ids, [False] * len(missing) + scored))
            continue
        ids, scored = next(encoded)
        scored[: len(prefix)] = [False] * len(prefix)
        if passage.ends and eos is not None:
            if ids[-1:] == [eos]:  # the tokenizer has already added it
                scored[-1] = True
            else:
                ids, scored = [*ids, eos], [*scored, True]
        documents.append(Document(ids, scored))
    return documents


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before any text, such as BOS; empty if there are none."""
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids_with_prefix: list[int] = tokenizer("a")["input_ids"]
    starts = range(len(ids_with_prefix) - len(ids) + 1)
    return ids_with_prefix[
        : next((at for at in starts if ids_with_prefix[at : at + len(ids)] == ids), 0)
    ]


def chat_prompt_ids(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, location: str = ""
) -> list[int]:
    """The token ids of a conversation up to the assistant's answer, with BOS first as in documents.

    Raises UserError, which names `location`, for turns that the chat template refuses.
    """
    text = chat.prompt_text(messages, tokenizer, location)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = prefix_ids(tokenizer)
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def _encode(
    passages: list[Passage], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[bool]]]:
    if not passages:
        return []
    texts = [passage.text for passage in passages]
    prompts = [passage.prompt for passage in passages]
    by_offset = tokenizer.is_fast and any(prompts)
    encoding = tokenizer(texts, return_offsets_mapping=by_offset, verbose=False)
    all_ids: list[list[int]] = encoding["input_ids"]
    if by_offset:
        return [
            (ids, [end > prompt or prompt == 0 for _, end in offsets])
            for ids, offsets, prompt in zip(
                all_ids, encoding["offset_mapping"], prompts, strict=True
            )
        ]
    pairs = zip(all_ids, passages, strict=True)
    return [(ids, _scored_by_prefix(ids, passage, tokenizer)) for ids, passage in pairs]


def _scored_by_prefix(
    ids: list[int], passage: Passage, tokenizer: PreTrainedTokenizerBase
) -> list[bool]:
    """The mask of scored tokens if the tokenizer has no offsets.

    The prompt ends at the first token where the tokens of the prompt alone differ from `ids`.
    """
    if passage.prompt == 0:
        return [True] * len(ids)
    prompt: list[int] = tokenizer(passage.text[: passage.prompt], verbose=False)["input_ids"]
    same = 0
    while same < min(len(prompt), len(ids)) and prompt[same] == ids[same]:
        same += 1
    return [at >= same for at in range(len(ids))]


def _conversation(messages: Any, location: str) -> Passage:
    valid = isinstance(messages, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and ("content" in turn or turn.get("tool_calls"))
        for turn in messages
    )
    if not valid or not messages:
        raise UserError(
            f"{location}: `messages` must be a list of objects with `role` and `content`"
        )
    cleaned = [_without_surrogates(turn, location) for turn in messages]
    cleaned = [{**turn, "content": _content(turn.get("content"), location)} for turn in cleaned]
    return Passage(json.dumps(cleaned, sort_keys=True, default=str), messages=cleaned)


def _content(content: Any, location: str) -> str | None:
    """The text of a turn, its parts joined by line ends; None if the turn only calls tools."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(
            f"{location}: the `content` of a turn is of type {type(content).__name__}; it must be "
            "text"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str) or (isinstance(part, dict) and part.get("type") != "text"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(
                f"{location}: the `content` of a turn has a part of type {kind}; only parts "
                '{"type": "text", "text": …} can be read'
            )
        texts.append(text)
    return "\n".join(texts)


def _without_surrogates(value: Any, location: str, depth: int = 0) -> Any:
    """Replace each half of a surrogate pair by a question mark.

    JSON can contain such halves, but no tokenizer accepts them. Raises UserError for a value that
    is nested too deeply.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if not isinstance(value, dict | list):
        return value
    if depth > DEEPEST:
        raise UserError(
            f"{location}: lists and objects are nested more than {DEEPEST} deep: flatten them"
        )
    if isinstance(value, list):
        return [_without_surrogates(item, location, depth + 1) for item in value]
    return {
        _without_surrogates(key, location): _without_surrogates(item, location, depth + 1)
        for key, item in value.items()
    }


def text_in(row: dict[str, Any], key: str, location: str) -> str:
    """The text under a key; raises UserError, which names `location`, if the value is not text."""
    value = row[key]
    if not isinstance(value, str):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise UserError(f"{location}: `{key}` is {kind}; it must be text")
    return str(_without_surrogates(value, location))
