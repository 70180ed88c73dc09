"""Texts to score: held-out sequences of `data`, and windows of further texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from regrow.data.sequences import Sequences
from regrow.data.sources import READERS, reader_of, resolve
from regrow.errors import UserError
from regrow.stages.evaluate.config import HELDOUT, EvaluateConfig
from regrow.training.text import text_for

IGNORED = -100
ROW_SEPARATOR = "\n\n"
CHARACTERS_PER_TOKEN = 8
MARGIN = 64
"""Extra tokens to read, because the last tokens of a truncated text may change with more text."""


@dataclass(frozen=True)
class Text:
    """A text tokenized by one tokenizer; the `labels` of its sequences mark the scored tokens."""

    name: str
    sequences: Sequences
    convention: str
    num_bytes: int | None = None
    """UTF-8 bytes of the scored tokens; None if unknown."""
    per_token: bool = True
    """Whether figures per token are comparable, which requires equal tokens in all models."""
    reference: Reference | None = None
    """The reference model's tokens, set if the tokenizers of the models differ."""


@dataclass(frozen=True)
class Reference:
    """Tokens of the reference model on the same text."""

    label: str
    bytes_per_token: float
    """UTF-8 bytes of the scored tokens ÷ number of scored tokens."""


def build_texts(
    data: DataConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    openings: dict[str, str] | None = None,
    configs: Iterable[dict[str, Any]] = (),
) -> list[Text]:
    """Build the held-out sequences of `data`, if any, then each further text of the config.

    `configs` are those of the models that will read them.
    A further text has `config.text_tokens` tokens, or is the string in `openings`. Raises UserError
    for a text that is missing, too short, or of an unknown file type.
    """
    texts, prefix = [], prefix_ids(tokenizer)
    if config.texts and config.window < len(prefix) + 2:
        raise UserError(
            f"window {config.window}: the tokenizer puts {len(prefix)} tokens before each text, "
            f"and a window needs two more; set it to {len(prefix) + 2} or more"
        )
    if data is not None:
        sequences = text_for(configs, data, tokenizer, "heldout", config.heldout_sequences)
        convention = (
            f"{len(sequences)} held-out sequences of {data.sequence_length} tokens of the data; "
            f"{_begun(tokenizer, prefix)}; documents do not attend to each other; prompts, padding "
            "and first tokens not scored"
        )
        texts.append(Text(HELDOUT, sequences, convention))
    for name, source in config.texts.items():
        if openings is None:
            text, ids = opening(text_files(source), tokenizer, config.text_tokens)
        else:
            text, ids = openings[name], _encode(openings[name], tokenizer)
        if len(ids) < 2:
            raise UserError(f"text {name!r}: {source} has {len(ids)} tokens; at least 2 are needed")
        sequences = windows(ids, config.window, prefix)
        convention = (
            f"first {len(ids):,} tokens of {Path(source).name}{_joined(source)}, windows of "
            f"{config.window} without overlap, {_begun(tokenizer, prefix)}, the first token of the "
            "text in a window not scored"
        )
        num_bytes = scored_bytes(text, tokenizer, sequences, len(prefix))
        texts.append(Text(name, sequences, convention, num_bytes))
    return texts


def openings_of(tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig) -> dict[str, str]:
    """For each further text, the string of its first `text_tokens` tokens, by name."""
    return {
        name: opening(text_files(source), tokenizer, config.text_tokens)[0]
        for name, source in config.texts.items()
    }


def _begun(tokenizer: PreTrainedTokenizerBase, prefix: list[int]) -> str:
    """Describe the first tokens of each document and window, for conventions."""
    tokens = " ".join(tokenizer.convert_ids_to_tokens(prefix))
    return f"each begins with {tokens}, which is not scored" if prefix else "no BOS"


def scored_bytes(
    text: str, tokenizer: PreTrainedTokenizerBase, sequences: Sequences, prefix: int = 0
) -> int | None:
    """UTF-8 bytes of the scored tokens of `text` in windows; None for a slow tokenizer.

    The first `prefix` tokens of each window are not part of the text. If a character is split into
    several tokens, its bytes count for the first of them.
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
    offsets: list[tuple[int, int]] = encoding["offset_mapping"]
    return offsets


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def in_other_ids(text: Text, ids_V: Tensor) -> Text:
    """Replace a text's input ids by another model's ids of the same tokens."""
    sequences = text.sequences
    other = Sequences(
        ids_V[sequences.input_ids], sequences.position_ids, sequences.labels, sequences.real
    )
    return replace(text, sequences=other)


def windows(ids: list[int], window: int, prefix: Sequence[int] = ()) -> Sequences:
    """Cut `ids` into sequences of `window` tokens, each starting with `prefix` (BOS).

    The prefix and the first text token of each window are not scored. The last window is padded on
    the right, where causal attention ignores the padding.
    """
    size = window - len(prefix)
    count = -(-len(ids) // size)
    real = (torch.arange(count * size) < len(ids)).view(count, size)
    text = torch.tensor(ids + [ids[0]] * (count * size - len(ids))).view(count, size)
    labels = torch.where(real, text, IGNORED)
    labels[:, 0] = IGNORED
    prefix_BP = torch.tensor(prefix, dtype=torch.int64).repeat(count, 1)
    return Sequences(
        torch.cat([prefix_BP, text], 1),
        torch.arange(window).repeat(count, 1),
        torch.cat([torch.full_like(prefix_BP, IGNORED), labels], 1),
        torch.cat([torch.ones_like(prefix_BP, dtype=torch.bool), real], 1),
    )


def text_files(source: str) -> list[Path]:
    """Local files of a text; raises UserError if there are none."""
    return resolve(SourceConfig(source=source))


def opening(
    paths: list[Path], tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> tuple[str, list[int]]:
    """Return the beginning of the text in `paths`, and its first `num_tokens` tokens.

    There are fewer tokens if the text is shorter, and no special tokens. The returned text ends
    with the last token; a character that this token splits is included completely. The files are
    read only as far as necessary: tokens far from the cut do not depend on the text after it.
    """
    characters = CHARACTERS_PER_TOKEN * (num_tokens + MARGIN)
    while True:
        text = _beginning(paths, characters)
        ids = _encode(text, tokenizer)
        if len(text) < characters or len(ids) >= num_tokens + MARGIN:
            break
        characters *= 2
    if len(ids) <= num_tokens:
        return text, ids
    if not tokenizer.is_fast:
        decoded = tokenizer.decode(ids[:num_tokens])
        assert isinstance(decoded, str)
        return decoded, ids[:num_tokens]
    return text[: max(end for _, end in _offsets(text, tokenizer)[:num_tokens])], ids[:num_tokens]


def _beginning(paths: list[Path], characters: int) -> str:
    """Read the first `characters` of the files: raw text unchanged, rows joined by blank lines."""
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


def _row_text(row: dict[str, Any], location: str) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("context"), str) and isinstance(row.get("continuation"), str):
        return f"{row['context']} {row['continuation']}"
    raise UserError(
        f"{location}: has {', '.join(sorted(row))}; a text to score needs `text`, or `context` and "
        "`continuation`"
    )


def _joined(source: str) -> str:
    raw = plain_name(Path(source)).endswith(".txt")
    return " unchanged" if raw else " (rows joined by blank lines)"
