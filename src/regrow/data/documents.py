"""Rows → passages of one split → tokenized documents with a mask of the tokens that count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from regrow.data import chat
from regrow.data.config import DataConfig, Split
from regrow.data.wikitext import sections
from regrow.errors import UserError

ALLOWED = "`text`, `prompt` + `completion`, `question` + `answer`, or `messages`"


@dataclass(frozen=True)
class Passage:
    """A document's text before it is tokenized."""

    text: str
    """The words; of `messages` their JSON, which is the same for every tokenizer."""
    prompt: int = 0
    """How many of the first characters are a prompt, and not scored."""
    ends: bool = True
    """Whether the document ends here, and gets the end-of-sequence token."""
    messages: list[dict[str, Any]] | None = None
    """The turns, for the chat template to render."""
    split_at: float | None = None
    """Where it falls among the splits, as `place_of`; None: that of its own text."""


@dataclass(frozen=True)
class Document:
    """Token ids and, for each, whether it is scored; position 0 is predicted from nothing."""

    ids: list[int]
    scored: list[bool]
    source: int = 0
    """Number of the source it is from."""


def read_row(row: dict[str, Any], where: str) -> Passage:
    """The passage in a row; of several kinds `messages` go first, then pairs, then `text`.

    A `split_at` in [0, 1), which generated rows have, puts it into the split of its prompt's row.
    Raises UserError, naming `where`, for a row of no known kind or with anything but text in it.
    """
    place = row.get("split_at")
    known = isinstance(place, float) and 0 <= place < 1
    return replace(_passage(row, where), split_at=place if known else None)


def _passage(row: dict[str, Any], where: str) -> Passage:
    if "messages" in row:
        return _conversation(row["messages"], where)
    if "prompt" in row and "completion" in row:
        prompt, answer = text_in(row, "prompt", where), text_in(row, "completion", where)
        apart = not prompt or prompt[-1].isspace() or answer[:1].isspace()
        prompt += "" if apart else " "
        return Passage(prompt + answer, prompt=len(prompt))
    if "question" in row and "answer" in row:
        prompt = text_in(row, "question", where) + "\n"
        return Passage(prompt + text_in(row, "answer", where), prompt=len(prompt))
    if "text" in row:
        return Passage(text_in(row, "text", where))
    keys = ", ".join(sorted(map(str, row))) or "none"
    raise UserError(f"{where}: has the keys {keys}; a row needs {ALLOWED}")


def place_of(text: str, seed: int) -> float:
    """u = blake2b(text, keyed by the seed) / 2^64 in [0, 1): what decides a document's split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(text: str, data: DataConfig, place: float | None = None) -> Split:
    """The split of the document `text`: by its content alone, so copies go the same way.

    By u, its `place` if given, else `place_of` it: held out below `heldout_fraction`, then
    calibration for `calibration_fraction`, train for the rest.
    """
    u = place_of(text, data.seed) if place is None else place
    if u < data.heldout_fraction:
        return "heldout"
    return "calibration" if u < data.heldout_fraction + data.calibration_fraction else "train"


def pieces(passage: Passage, size: int) -> Iterator[Passage]:
    """Plain text longer than 2 `size` characters in sections of about that, others as they are.

    A whole novel as one document would fill hundreds of blocks in a row; its sections can be
    shuffled. Only the last one ends.
    """
    if passage.prompt or passage.messages is not None or len(passage.text) <= 2 * size:
        yield passage
        return
    text, step = passage.text, 1 << 16
    parts = list(sections((text[at : at + step] for at in range(0, len(text), step)), size))
    for number, part in enumerate(parts, start=1):
        yield replace(passage, text=part, ends=number == len(parts))


def tokenize(passages: Sequence[Passage], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """The passages' documents, in order; plain ones in one call, which fast tokenizers do at once.

    ids are those of the whole text at once, with the special tokens the tokenizer adds by itself. A
    token is scored when it holds any character after the prompt; the end-of-sequence token, put
    after each that `ends`, is scored too. In a conversation only the assistant's tokens are.
    """
    plain = [passage for passage in passages if passage.messages is None]
    encoded = iter(_encode(plain, tokenizer))
    eos = tokenizer.eos_token_id
    documents = []
    for passage in passages:
        if passage.messages is not None:
            documents.append(Document(*chat.render(passage.messages, tokenizer)))
            continue
        ids, scored = next(encoded)
        if passage.ends and eos is not None:
            if ids[-1:] == [eos]:  # the tokenizer adds its own
                scored[-1] = True
            else:
                ids, scored = [*ids, eos], [*scored, True]
        documents.append(Document(ids, scored))
    return documents


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
    """For tokenizers without offsets: the prompt reaches as far as its tokens agree with `ids`."""
    if passage.prompt == 0:
        return [True] * len(ids)
    prompt: list[int] = tokenizer(passage.text[: passage.prompt], verbose=False)["input_ids"]
    same = 0
    while same < min(len(prompt), len(ids)) and prompt[same] == ids[same]:
        same += 1
    return [at >= same for at in range(len(ids))]


def _conversation(messages: Any, where: str) -> Passage:
    turns = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn
        for turn in messages
    )
    if not turns or not messages:
        raise UserError(f"{where}: `messages` must be a list of objects with `role` and `content`")
    text = json.dumps(messages, sort_keys=True, default=str)
    return Passage(text, messages=messages)


def text_in(row: dict[str, Any], key: str, where: str) -> str:
    """The text under a key; raises UserError, naming `where`, for anything else there."""
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: `{key}` is of type {type(value).__name__}; it must be text")
    # JSON can hold half a surrogate pair, which no tokenizer takes.
    return value.encode("utf-8", "replace").decode("utf-8")
