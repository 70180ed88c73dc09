"""Presets: recipes for a purpose, for any model and text.

A preset is a YAML file in `preset_recipes/`. MODEL, DATA, TEACHER and PROMPTS in it stand for what
the command line gives, and `75% of layers` for a share of a size of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from regrow.errors import UserError, unknown

FOLDER = Path(__file__).with_name("preset_recipes")
PREFIX = "preset:"
SHARE = re.compile(r"(\d+)% of (\w+)")
WIDTH = 32
"""Widths are rounded down to a multiple of this where they are larger."""
FLAGS = {"MODEL": "--model", "DATA": "--data", "TEACHER": "--teacher", "PROMPTS": "--prompts"}


def names() -> list[str]:
    """All presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def summary(name: str) -> str:
    """The first sentence of a preset's comment."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line[2:] for line in lines if line.startswith("# "))
    return re.split(r"(?<=[a-z)])\. |: ", comment)[0].rstrip(".") + "."


def fields(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a preset's recipe; `given` has MODEL, DATA, TEACHER and PROMPTS.

    Raises UserError for an unknown preset, a value that it needs and lacks, and one that it has no
    place for.
    """
    if name not in names():
        raise unknown("preset", name, names())
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    recipe: dict[str, Any] = yaml.safe_load(text)
    used = {word for word in FLAGS if re.search(rf"\b{word}\b", _without_comments(text))}
    for word in sorted(used):
        if not given.get(word):
            raise UserError(f"{PREFIX}{name} needs {FLAGS[word]}")
    for word, value in given.items():
        if value and word not in used:
            raise UserError(f"{PREFIX}{name} has no use for {FLAGS[word]}: leave it out")
    filled: dict[str, Any] = _filled(recipe, given)
    return filled


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def _filled(value: Any, given: Mapping[str, Any]) -> Any:
    """The value with all words and shares replaced, in nested lists and dicts."""
    if isinstance(value, dict):
        return {key: _filled(each, given) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, given) for each in value]
    if not isinstance(value, str):
        return value
    if value in FLAGS:
        return list(given[value]) if value == "DATA" else given[value]
    match = SHARE.fullmatch(value)
    return _share(int(match[1]), match[2], str(given["MODEL"])) if match else value


def _share(percent: int, dim: str, model: str) -> int:
    """A share of a size of the model, rounded down to a legal width."""
    from regrow import families
    from regrow.checkpoint import load

    checkpoint = load(model)
    full = families.of(checkpoint).sizes(checkpoint.config)
    if dim not in full:
        raise UserError(f"{model} has no {dim}: this preset is not for a mixture of experts")
    size = max(1, round(full[dim] * percent / 100))
    if dim == "layers":
        return size
    return size // WIDTH * WIDTH or size // 8 * 8 or size
