"""Flags and arguments that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from regrow.config import Config, parse
from regrow.data.config import DataConfig
from regrow.errors import UserError
from regrow.stage_dir import refuse_foreign

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint
    from regrow.stages.evaluate.gguf_model import GgufFile

Model = Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]


class OptionalText(Config):
    """The text to work on."""

    data: tuple[str, ...] = ()
    """Text: files, folders, hub ids, package:NAME==VERSION/path."""
    data_weights: tuple[float, ...] = ()
    """Share of each source in the blend."""
    sequence_length: int = 512
    """Tokens per block."""

    def blend(self) -> DataConfig:
        """The sources as a recipe's `data`; raises UserError for weights that do not fit them."""
        count = len(self.data)
        if self.data_weights and len(self.data_weights) != count:
            given = len(self.data_weights)
            raise UserError(f"{given} --data-weights for {count} --data: give one each")
        shares = self.data_weights or (1.0,) * count
        blend = [{"source": s, "weight": w} for s, w in zip(self.data, shares, strict=True)]
        fields = {"sources": blend, "sequence_length": self.sequence_length}
        return parse(DataConfig, fields, "--data")


class Text(OptionalText):
    """The text to work on."""

    data: tuple[str, ...]
    """Text: files, folders, hub ids, package:NAME==VERSION/path."""


def print_lines(lines: list[str], out: Path | None = None) -> None:
    """What a dry run says; raises UserError for an `out` that is not ours to write to."""
    if out is not None:
        refuse_foreign(out)
    print("\n".join(lines))


def open_model(model: str, quantized: bool = False) -> Checkpoint:
    """A checkpoint of a known family: the stages take any, and find out late."""
    from regrow import families
    from regrow.checkpoint import load

    checkpoint = load(model, quantized)
    families.of(checkpoint)
    return checkpoint


def open_measured(model: str) -> Checkpoint | GgufFile:
    """As `open_model`, and a file NAME.gguf for llama.cpp to run."""
    from regrow import families
    from regrow.stages.evaluate.gguf_model import GgufFile, open_model

    found = open_model(model)
    if not isinstance(found, GgufFile):
        families.of(found)
    return found


def by_name(models: tuple[str, ...]) -> dict[str, str]:
    """The models of NAME=FOLDER and FOLDER; raises UserError for a name given twice."""
    named: dict[str, str] = {}
    for model in models:
        name, equals, folder = model.partition("=")
        named[name if equals else Path(model).name] = folder if equals else model
    if len(named) < len(models):
        raise UserError("two models have the same name: give NAME=FOLDER for each")
    return named
