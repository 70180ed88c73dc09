"""A tiny job on disk: a model, text and a recipe, for tests of recipes and of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
import yaml
from tiny_folders import write_text

from regrow.cli.main import main

__all__ = ["write_text"]

Refused = Callable[..., str]
"""Runs a command that must be refused; returns what it said."""

COMMANDS = ("profile", "prune", "cache", "distill", "quantize", "evaluate", "run")
"""Those that write a folder."""
LENGTH = 32
"""Tokens per sequence."""
PROFILE: dict[str, Any] = {"profile": {"samples": 16, "gram_tokens": 512}}
PRUNE: dict[str, Any] = {"prune": {"intermediate_size": 40, "multiple_of": 8}}
DISTILL: dict[str, Any] = {
    "distill": {"tokens": 1280, "batch_tokens": 128, "eval_tokens": 256, "heldout_sequences": 4}
}
EVALUATE: dict[str, Any] = {
    "evaluate": {
        "heldout_sequences": 4,
        "new_tokens": 4,
        "prefill_tokens": 16,
        "decode_tokens": 2,
        "repeats": 1,
    }
}


def write_model(folder: Path, **overrides: Any) -> Path:
    """A tiny llama of 3 layers in bfloat16, with tokenizer and chat template."""
    fields = {"head_dim": 8, **overrides}
    tiny_folders.write_model(folder, dtype=torch.bfloat16, **fields)
    return folder


def recipe_fields(model: Path, text: Path, *stages: Any) -> dict[str, Any]:
    """The fields of a recipe; without `stages`: profile, prune the MLP, distill, evaluate."""
    return {
        "model": str(model),
        "data": {"sources": [str(text)], "sequence_length": LENGTH, "heldout_fraction": 0.1},
        "stages": list(stages) or [PROFILE, PRUNE, DISTILL, EVALUATE],
    }


def write_recipe(path: Path, fields: dict[str, Any]) -> Path:
    """`fields` as YAML."""
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    return path


def command(name: str, place: Path, model: Path, out: Path) -> list[object]:
    """A command on `model`, with the text.jsonl and profile/ of `place`, that writes to `out`."""
    text = ["--data", place / "text.jsonl", "--sequence-length", LENGTH]
    sizes = ["--intermediate-size", 40, "--multiple-of", 8]
    recipe = write_recipe(place / "recipe.yaml", recipe_fields(model, place / "text.jsonl"))
    return {
        "inspect": ["inspect", model],
        "profile": ["profile", model, *text, "--samples", 16, "--gram-tokens", 512, "--out", out],
        "prune": ["prune", model, "--profile", place / "profile", *sizes, "--out", out],
        "cache": ["cache", model, *text, "--tokens", 512, "--heldout-sequences", 2, "--out", out],
        "distill": [
            *("distill", model, "--teacher", model, *text, "--out", out),
            *("--tokens", 512, "--batch-tokens", 128, "--eval-tokens", 256),
            *("--heldout-sequences", 2),
        ],
        "quantize": ["quantize", model, *text, "--samples", 16, "--out", out],
        "evaluate": ["evaluate", model, "--against", model, *text, "--out", out],
        "run": ["run", recipe, "--out", out],
    }[name]


def call(*arguments: object) -> None:
    """Run a command that must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


def write_job(place: Path) -> Path:
    """`place` with a model, text.jsonl and a profile of the model, as `command` needs."""
    write_model(place / "model")
    write_text(place / "text.jsonl")
    call(*command("profile", place, place / "model", place / "profile"))
    return place


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, at_once: bool = True) -> str:
    """Run a command that must exit with 2 and one line, which is returned; by default no other."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    lines = [line for line in output.err.splitlines() if not line.startswith("run: opening ")]
    assert [line.startswith("regrow: error: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("regrow: error: ")
    if at_once:
        assert len(lines) == 1
        assert output.out == ""
    return lines[-1].removeprefix("regrow: error: ")
