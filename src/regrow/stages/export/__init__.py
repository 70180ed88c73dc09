"""Export: a GGUF file for llama.cpp and Ollama, proven by llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from tyro.conf import OmitArgPrefixes

from regrow.config import Config
from regrow.quantization import formats
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, OptionalText, print_lines


class ExportConfig(Config):
    """The file's type, and how it is proven."""

    type: str = "Q8_0"
    """How weights are stored: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, or a mix of K-quants
    (Q6_K, Q5_K_M, Q5_K_S, Q4_K_M, Q4_K_S, Q3_K_L, Q3_K_M, Q3_K_S, Q2_K), for which llama.cpp is
    needed."""
    name: str | None = Field(default=None, min_length=1, pattern=r"^[^/\\]+$")
    """Name of the model, and of the file; by default that of the run or the folder."""
    pre: str | None = None
    """llama.cpp's name for how the tokenizer splits text, where it is not recognised."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Whether llama.cpp opens the file and is compared with transformers: auto does where it is
    installed."""
    verify_tokens: int = Field(default=512, ge=1)
    """Positions to compare on, at most: of held-out text of the data, else of a built-in text."""
    prompt: str = Field(default="The capital of France is", min_length=1)
    """What both continue greedily."""
    new_tokens: int = Field(default=24, ge=1)
    """Tokens of that continuation."""

    @field_validator("type")
    @classmethod
    def _known_type(cls, name: str) -> str:
        return formats.find_gguf(name).name


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

        checkpoint, data = load(model), text.blend() if text.data else None
        from regrow.stages.export.stage import describe, export

        if dry_run:
            folder = None if out.suffix == ".gguf" else out
            print_lines(describe(checkpoint, file, model), folder)
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
