"""Writes docs/reference.md: all commands, flags and recipe fields, from the code.

python docs/reference.py            # writes the page
python docs/reference.py --check    # exits with 1 if the page is not up to date
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse
from pydantic_core import PydanticUndefined

from regrow import stage
from regrow.cli.main import commands
from regrow.config import Config, Machine, Options, ProfileMachine, ReconstructMachine
from regrow.data.config import DataConfig, SourceConfig
from regrow.recipe import presets
from regrow.recipe.recipe import Recipe

PAGE = Path(__file__).with_name("reference.md")
SHARED: dict[type, str] = {
    Machine: "machine-options",
    ProfileMachine: "machine-options",
    ReconstructMachine: "machine-options",
    Options: "machine-options",
}
HEAD = """# Reference

All commands with their flags, and all fields of a recipe. This page is written by
`python docs/reference.py` from the code; a test checks that it is up to date. [Recipes](recipes.md)
explains how they work together, and `regrow COMMAND --help` prints the same.

A field of a stage is written with underscores in a recipe (`keep_params: 0.8`) and with hyphens on
the command line (`--keep-params 0.8`).
"""
ROUNDING = """These change a result by rounding at most: batch size, kernels, compilation and the
data type of the device change its last digits."""
LINKS = {"DataConfig": "[data](#data)", "SourceConfig": "[source](#a-source-of-data)"}


def page() -> str:
    """The whole page."""
    parts = [HEAD, _recipe()]
    for name, command in commands().items():
        parts.append(_command(name, command))
    parts.append(f"## Machine options\n\n{ROUNDING}\n\n" + fields(Options))
    parts.append("## Presets\n\n`regrow run preset:NAME --model MODEL --data TEXT --out DIR`\n")
    parts.append(
        table(("preset", "what it is"), [(f"`{n}`", presets.summary(n)) for n in presets.names()])
    )
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _recipe() -> str:
    parts = ["## A recipe\n", fields(Recipe), "### data\n", fields(DataConfig)]
    parts += ["### A source of data\n", fields(SourceConfig)]
    return "\n".join(parts)


def _command(name: str, command: Callable[..., None]) -> str:
    """The section of a command: its own flags, and the fields of its stage."""
    help_text = parse(command.__doc__ or "")
    hints = get_type_hints(command, include_extras=True)
    described = {param.arg_name: param.description or "" for param in help_text.params}
    rows, configs = [], []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        kind = _config_of(hint)
        if kind is not None:
            configs.append(kind)
        else:
            rows.append(_flag(parameter, hint, described.get(parameter.name, "")))
    parts = [f"## regrow {name}\n\n{help_text.short_description}\n"]
    parts.append(table(("argument", "default", "what it is"), rows))
    for kind in configs:
        if kind in SHARED:
            options = ", ".join(f"`--{_hyphens(field)}`" for field in kind.model_fields)
            parts.append(f"It also reads [machine options](#machine-options): {options}.\n")
        else:
            parts.append(f"{_first_line(kind)}\n\n{fields(kind)}")
    recipe_fields = stage.find(name).recipe_fields if name in stage.names() else None
    if recipe_fields is not None:
        parts.append(f"Only in a recipe:\n\n{fields(recipe_fields)}")
    return "\n".join(parts)


def _flag(parameter: inspect.Parameter, hint: Any, text: str) -> tuple[str, str, str]:
    positional = "Positional" in str(hint) or "_PositionalMarker" in str(hint)
    name = parameter.name.upper() if positional else f"--{_hyphens(parameter.name)}"
    required = parameter.default is inspect.Parameter.empty
    default = "required" if required else shown(parameter.default)
    return f"`{name}`", default, one_line(text)


def _config_of(hint: Any) -> type[Config] | None:
    """The config class of a parameter that stands for several flags."""
    inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return inner if isinstance(inner, type) and issubclass(inner, Config) else None


def _first_line(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def fields(kind: type[Config]) -> str:
    """A table of a config's fields."""
    rows = []
    for name, field in kind.model_fields.items():
        if field.is_required():
            default = "required"
        else:
            default = shown(field.get_default(call_default_factory=True, validated_data={}))
        allowed = type_name(field.annotation) + _limits(field.metadata)
        rows.append((f"`{name}`", allowed, default, one_line(field.description or "")))
    return table(("field", "type", "default", "what it is"), rows)


def _limits(metadata: list[Any]) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [
        f"{sign} {getattr(each, key):g}"
        for each in metadata
        for key, sign in signs.items()
        if getattr(each, key, None) is not None
    ]
    return f" {', '.join(found)}" if found else ""


def type_name(hint: Any) -> str:
    """A type as a reader of recipes writes it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return type_name(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(each) for each in inner if each is not type(None))
    if origin in (list, tuple):
        return f"list of {type_name(inner[0])}"
    if origin is dict:
        return f"{type_name(inner[0])}: {type_name(inner[1])}"
    if isinstance(hint, type) and issubclass(hint, Config):
        return LINKS.get(hint.__name__, hint.__name__)
    return {bool: "true or false", int: "int", float: "number", str: "text", Any: "fields"}.get(
        hint, getattr(hint, "__name__", "any")
    )


def shown(value: Any) -> str:
    """A default; a long one is cut."""
    if value is None or value is PydanticUndefined or value in ((), {}, []):
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) if len(value) < 4 else f"{len(value)} of them"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {each:g}" for key, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; empty if it has no rows."""
    if not rows:
        return ""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def one_line(text: str) -> str:
    """Text for a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").strip()


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


def main() -> None:
    """Write the page, or compare it."""
    if "--check" in sys.argv[1:]:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        sys.exit(0 if same else "docs/reference.md is not up to date: run python docs/reference.py")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
