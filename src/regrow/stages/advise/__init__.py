"""Advise: which compression, at what loss and cost, from a model's config alone."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import OmitArgPrefixes

from regrow.stage import Stage
from regrow.stages._flags import Model, print_lines
from regrow.stages.advise.config import AdviseConfig


class AdviseStage(Stage):
    """Takes a model's config and a request; leaves advice and recipes. It is a command only."""

    config = AdviseConfig
    in_recipes = False

    def command(
        self,
        model: Model,
        out: Path | None = None,
        request: OmitArgPrefixes[AdviseConfig] = AdviseConfig(),
    ) -> None:
        """Advise which compression to use: what it loses, what it costs, and the recipe for it.

        Args:
            model: Folder, config.json, hub id or GGUF file; its weights are not read.
            out: Folder to write the advice and its recipes to.
            request: Target, tolerated loss, budget, task, hardware and use.
        """
        from regrow.stages.advise.stage import advise

        print_lines(advise(model, request, out).lines())


STAGE = AdviseStage()
