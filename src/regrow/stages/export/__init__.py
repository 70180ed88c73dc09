"""Export: a GGUF file for llama.cpp and Ollama, proven by llama.cpp."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import OmitArgPrefixes

from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, OptionalText, print_lines
from regrow.stages.export.config import ExportConfig


class ExportStage(Stage):
    """Takes the current model, before it was quantized; leaves a GGUF file."""

    config = ExportConfig

    def command(
        self,
        model: Model,
        out: Path,
        text: OmitArgPrefixes[OptionalText] = OptionalText(),
        file: OmitArgPrefixes[ExportConfig] = ExportConfig(),
        dry_run: bool = False,
    ) -> None:
        """Write a GGUF file for llama.cpp and Ollama, and prove it by llama.cpp.

        Args:
            model: Hugging Face folder, hub id, GGUF file, or package:NAME.
            out: Folder to write to, or the file's name, NAME.gguf.
            file: The file's type, and how it is proven.
            dry_run: Check everything and print what would be done.
        """
        from regrow.checkpoint import load
        from regrow.stages.export.stage import describe, export

        data = text.blend() if text.data else None
        if dry_run:
            folder = None if out.suffix == ".gguf" else out
            print_lines(describe(load(model), file, model), folder)
            return
        print(export(model, out, file, data))

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for a type or an architecture that llama.cpp cannot hold."""
        from regrow.stages.export.stage import check

        check(plan.checkpoint, step.config)

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Export the current model, as it was before it was quantized."""
        from regrow.stages.export.stage import export

        export(run.plain, run.folder(folder), step.config, run.data)


STAGE = ExportStage()
