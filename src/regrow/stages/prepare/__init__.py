"""Prepare: tokenize text once, for all runs, stages and processes that read it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from tyro.conf import OmitArgPrefixes

from regrow.config import Config
from regrow.stage import Stage
from regrow.stages._flags import Model, Text, print_lines


class PrepareConfig(Config):
    """How the tokens are stored, and in which order they are read."""

    order: Literal["shuffled", "files"] = "shuffled"
    """Order in which documents are read: random over the whole source (shuffled), or that of the
    files, shuffled only within a window (files), which gives the same sequences as the text."""
    shard_characters: int = Field(default=8_000_000, ge=1)
    """Characters of text in each shard, at least; a shard is what a stop can lose."""


class PrepareStage(Stage):
    """Tokenizes text into a folder that is then given as data."""

    config = PrepareConfig
    in_recipes = False

    def command(
        self,
        model: Model,
        text: OmitArgPrefixes[Text],
        out: Path,
        preparing: OmitArgPrefixes[PrepareConfig] = PrepareConfig(),
        seed: int = 0,
        workers: int = 0,
        dry_run: bool = False,
    ) -> None:
        """Tokenize text once, with all cores, into a folder that any stage then reads as data.

        Args:
            model: Model whose tokenizer is used: folder, hub id, GGUF file, or package:NAME.
            out: Folder to write the tokens to; the same command continues after a stop.
            preparing: Size of the shards, and the order of reading.
            seed: Seed of the splits, as in the recipes that will read the tokens.
            workers: Processes that tokenize; 0 is one for each core.
            dry_run: Check everything and print what would be done.
        """
        from regrow.stages.prepare.stage import estimate, prepare

        data = text.blend().model_copy(update={"seed": seed})
        if dry_run:
            print_lines(estimate(model, data, out, workers), out)
            return
        prepare(model, data, out, preparing, workers)


STAGE = PrepareStage()
