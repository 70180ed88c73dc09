"""Export: a GGUF file for llama.cpp and Ollama, or a folder with sparse weights as bitmasks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from tyro.conf import OmitArgPrefixes

from regrow.config import Config
from regrow.quantization import formats
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, OptionalText, print_lines

BITMASK = "bitmask"
"""The type of a folder with sparse weights as bitmasks, instead of a GGUF file."""


class ExportConfig(Config):
    """The type of the GGUF file and the settings of its verification."""

    type: str = "Q8_0"
    """Type of the weights: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, or a mix of K-quants
    (Q6_K, Q5_K_M, Q5_K_S, Q4_K_M, Q4_K_S, Q3_K_L, Q3_K_M, Q3_K_S, Q2_K), which needs llama.cpp.
    bitmask writes a folder instead of a GGUF file. It stores only the weights that are not zero,
    and the fields below do not apply."""
    name: str | None = Field(default=None, min_length=1, pattern=r"^[^/\\]+$")
    """Name of the model and of the file; by default the name of the run or the folder."""
    pre: str | None = None
    """llama.cpp's name of the tokenizer's pre-tokenizer, for a tokenizer that is not recognised."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Whether to open the file with llama.cpp and compare it with transformers: auto does so if
    llama.cpp is installed."""
    verify_tokens: int = Field(default=512, ge=1)
    """Most positions to compare: of held-out text of the data, or else of a built-in text."""
    prompt: str = Field(default="The capital of France is", min_length=1)
    """Prompt that llama.cpp and transformers both continue greedily."""
    new_tokens: int = Field(default=24, ge=1)
    """Number of tokens of that greedy continuation."""

    @field_validator("type")
    @classmethod
    def _known_type(cls, name: str) -> str:
        return BITMASK if name.lower() == BITMASK else formats.find_gguf(name).name


class ExportStage(Stage):
    """Reads the current model, as it was before quantization, and writes a GGUF file."""

    config = ExportConfig

    def command(
        self,
        model: Model,
        out: Path,
        text: OmitArgPrefixes[OptionalText] = OptionalText(),
        file: OmitArgPrefixes[ExportConfig] = ExportConfig(),
        dry_run: bool = False,
    ) -> None:
        """Write a GGUF file for llama.cpp and Ollama, and verify it with llama.cpp.

        Args:
            model: Hugging Face folder, hub id, GGUF file, or package:NAME.
            out: Folder to write to, or the file's name, NAME.gguf.
            file: The type of the GGUF file and the settings of its verification.
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
        """Raise UserError for a type or an architecture that llama.cpp does not support."""
        from regrow.sparsity.zeros import NOTE
        from regrow.stages.export.stage import check

        if step.config.type != BITMASK:
            check(plan.checkpoint, step.config)
        elif NOTE not in plan.left:
            from regrow.stages.export.bitmask_folder import sparse_modules

            sparse_modules(plan.checkpoint)

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Export the current model, as it was before quantization."""
        from regrow.stages.export.stage import export

        export(run.plain, run.folder(folder), step.config, run.data)


STAGE = ExportStage()
