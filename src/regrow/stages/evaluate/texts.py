"""The text that models are scored on: held-out sequences of the data, and windows of more texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow import plugins
from regrow.data import DataConfig, SourceConfig
from regrow.data.documents import prefix_ids
from regrow.data.files import open_text, plain_name
from regrow.data.sequences import Sequences, build_sequences
from regrow.data.sources import READERS, reader_of, resolve
from regrow.errors import UserError
from regrow.stages.evaluate.config import HELDOUT, EvaluateConfig

IGNORED = -100
ROW_SEPARATOR = "\n\n"
CHARACTERS_PER_TOKEN = 8
MARGIN = 64
"""Tokens at the end of a cut text that may come out otherwise when more follows."""


@dataclass(frozen=True)
class Text:
    """A text in one tokenizer's tokens; `labels` of its blocks say what is scored."""

    name: str
    sequences: Sequences
    convention: str
    num_bytes: int | None = None
    """UTF-8 bytes of the scored tokens; None when they cannot be told."""
    per_token: bool = True
    """Whether figures per token compare, as all models have the same tokens."""
    reference: Reference | None = None
    """Where another model's tokens say where the text ends, what they are like."""


@dataclass(frozen=True)
class Reference:
    """The tokens of the model that the others are compared with, on the same text."""

    label: str
    bytes_per_token: float
    """UTF-8 bytes of its scored tokens ÷ their number."""


def build_texts(
    data: DataConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    openings: dict[str, str] | None = None,
) -> list[Text]:
    """The held-out blocks of `data`, if any, then each further text of the config.

    A further text has `config.text_tokens` tokens, or is the string that `openings` has for it.
    Raises UserError for a text that is missing, of an unknown kind or too short.
    """
    texts, prefix = [], prefix_ids(tokenizer)
    if config.texts and config.window < len(prefix) + 2:
        raise UserError(
            f"window {config.window}: the tokenizer puts {len(prefix)} tokens before each text, "
            f"and a window needs two more; set it to {len(prefix) + 2} or more"
        )
    if data is not None:
        sequences = build_sequences(data, tokenizer, "heldout", config.heldout_sequences)
        how = (
            f"{len(sequences)} held-out sequences of {data.sequence_length} tokens of the data; "
            f"{_begun(tokenizer, prefix)}; documents do not attend to each other; prompts, padding "
            "and first tokens not scored"
        )
        texts.append(Text(HELDOUT, sequences, how))
    for name, source in config.texts.items():
        if openings is None:
            text, ids = opening(text_files(source), tokenizer, config.text_tokens)
        else:
            text, ids = openings[name], _encode(openings[name], tokenizer)
        if len(ids) < 2:
            raise UserError(
                f"text {name!r}: {source} holds {len(ids)} tokens; at least 2 are needed"
            )
        sequences = windows(ids, config.window, prefix)
        how = (
            f"first {len(ids):,} tokens of {Path(source).name}{_joined(source)}, windows of "
            f"{config.window} without overlap, {_begun(tokenizer, prefix)}, the first token of the "
            "text in a window not scored"
        )
        num_bytes = scored_bytes(text, tokenizer, sequences, len(prefix))
        texts.append(Text(name, sequences, how, num_bytes))
    return texts


def openings_of(tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig) -> dict[str, str]:
    """The string that each further text's first tokens stand for, by its name."""
    return {
        name: opening(text_files(source), tokenizer, config.text_tokens)[0]
        for name, source in config.texts.items()
    }


def _begun(tokenizer: PreTrainedTokenizerBase, prefix: list[int]) -> str:
    """What each document and window begins with, for conventions."""
    tokens = " ".join(tokenizer.convert_ids_to_tokens(prefix))
    return f"each begins with {tokens}, which is not scored" if prefix else "no BOS"


def scored_bytes(
    text: str, tokenizer: PreTrainedTokenizerBase, sequences: Sequences, prefix: int = 0
) -> int | None:
    """UTF-8 bytes of the scored tokens of `text` in windows; None for a slow tokenizer.

    The first `prefix` tokens of each window are not of the text. A character's bytes count for the
    first of the tokens that it is split into.
    """
    if not tokenizer.is_fast:
        return None
    real, labels = sequences.real[:, prefix:], sequences.labels[:, prefix:]
    ends = [end for _, end in _offsets(text, tokenizer)][: int(real.sum())]
    size_of = torch.tensor([0, *(len(character.encode()) for character in text)]).cumsum(0)
    reached = size_of[torch.tensor(ends)].cummax(0).values
    bytes_of = torch.diff(reached, prepend=torch.zeros(1, dtype=torch.int64))
    return int(bytes_of[labels[real] != IGNORED].sum())


def _offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found: list[tuple[int, int]] = encoding["offset_mapping"]
    return found


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def in_other_ids(text: Text, ids_V: Tensor) -> Text:
    """A text with its input ids replaced by another model's for the same tokens."""
    sequences = text.sequences
    other = Sequences(
        ids_V[sequences.input_ids], sequences.position_ids, sequences.labels, sequences.real
    )
    return replace(text, sequences=other)


def windows(ids: list[int], window: int, prefix: Sequence[int] = ()) -> Sequences:
    """`ids` cut into sequences of `window` tokens, each beginning with the `prefix` (BOS).

    The prefix is not scored, nor is a window's first token of the text. The rest that fills no
    window is padded on the right, where causal attention does not see it.
    """
    size = window - len(prefix)
    count = -(-len(ids) // size)
    real = (torch.arange(count * size) < len(ids)).view(count, size)
    text = torch.tensor(ids + [ids[0]] * (count * size - len(ids))).view(count, size)
    labels = torch.where(real, text, IGNORED)
    labels[:, 0] = IGNORED
    before = torch.tensor(prefix, dtype=torch.int64).repeat(count, 1)
    return Sequences(
        torch.cat([before, text], 1),
        torch.arange(window).repeat(count, 1),
        torch.cat([torch.full_like(before, IGNORED), labels], 1),
        torch.cat([torch.ones_like(before, dtype=torch.bool), real], 1),
    )


def text_files(source: str) -> list[Path]:
    """The local files of a text; raises UserError when there are none."""
    return resolve(SourceConfig(source=source))


def opening(
    paths: list[Path], tokenizer: PreTrainedTokenizerBase, wanted: int
) -> tuple[str, list[int]]:
    """The beginning of the text in `paths`, and its first `wanted` tokens (fewer if it ends).

    Without special tokens. The text ends where the last token does; a character that it ends
    inside of is whole. Reads no further than it needs: a text cut well behind the last wanted token
    has the same ones.
    """
    characters = CHARACTERS_PER_TOKEN * (wanted + MARGIN)
    while True:
        text = _beginning(paths, characters)
        ids = _encode(text, tokenizer)
        if len(text) < characters or len(ids) >= wanted + MARGIN:
            break
        characters *= 2
    if len(ids) <= wanted:
        return text, ids
    if not tokenizer.is_fast:
        decoded = tokenizer.decode(ids[:wanted])
        assert isinstance(decoded, str)
        return decoded, ids[:wanted]
    return text[: max(end for _, end in _offsets(text, tokenizer)[:wanted])], ids[:wanted]


def _beginning(paths: list[Path], characters: int) -> str:
    """The first `characters` of the files: raw text as it stands, rows joined by blank lines."""
    parts: list[str] = []
    size = 0
    for part in chain.from_iterable(_parts(path, characters) for path in paths):
        if parts:
            part = ROW_SEPARATOR + part
        parts.append(part)
        size += len(part)
        if size >= characters:
            break
    return "".join(parts)[:characters]


def _parts(path: Path, characters: int) -> Any:
    if plain_name(path).endswith(".txt"):
        with open_text(path) as file:
            yield file.read(characters)
        return
    for number, row in enumerate(plugins.load(READERS, reader_of(path)).read(path), start=1):
        yield _row_text(row, f"{path}, row {number}")


def _row_text(row: dict[str, Any], where: str) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("context"), str) and isinstance(row.get("continuation"), str):
        return f"{row['context']} {row['continuation']}"
    raise UserError(
        f"{where}: has {', '.join(sorted(row))}; a text to score needs `text`, or `context` and "
        "`continuation`"
    )


def _joined(source: str) -> str:
    raw = plain_name(Path(source)).endswith(".txt")
    return " as it stands" if raw else " (rows joined by blank lines)"
