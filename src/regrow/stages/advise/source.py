"""A model of which only the config and the texts about it are read: no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from regrow.checkpoint.model_config import accept_config, read_config, text_fields
from regrow.checkpoint.resolve import HUB_ID, gguf_of, resolve_model
from regrow.errors import UserError

CARD, LICENSES = "README.md", ("LICENSE", "LICENSE.txt", "LICENSE.md")


class Source(NamedTuple):
    """A model's name, config, model card and licence."""

    name: str
    config: dict[str, Any]
    card: str
    """The text of its README.md; empty if there is none."""
    licence: str
    """The text of its LICENSE file; empty if there is none."""


def open_source(model: str) -> Source:
    """Read a folder, a config.json, a GGUF file or a hub id; the weights need not be there.

    Raises UserError for a model that is not there, or that regrow does not support.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".json":
        name = str(path.parent) if path.name == "config.json" else model
        source = Source(name, _fields(path), "", "")
    elif path.is_dir() or gguf_of(model) is not None:
        source = _of_folder(model, path if path.is_dir() else resolve_model(model))
    elif HUB_ID.fullmatch(model) and not model.startswith("."):
        source = _of_hub(model)
    else:
        raise UserError(f"no such model folder, config.json or hub id: {model}")
    source = source._replace(config=text_fields(source.config, Path(model)))
    accept_config(source.config, Path(model))
    return source


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise UserError(f"{path} names no model_type: give the config.json of a model")
    return fields


def _of_folder(model: str, folder: Path) -> Source:
    texts = [_text(folder / CARD), *(_text(folder / name) for name in LICENSES)]
    return Source(model, read_config(folder), texts[0], next(filter(None, texts[1:]), ""))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _of_hub(model: str) -> Source:
    """Fetch the config and the card alone."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    def fetch(name: str) -> str:
        try:
            return Path(hf_hub_download(model, name)).read_text(encoding="utf-8", errors="replace")
        except (LocalEntryNotFoundError, OfflineModeIsEnabled):
            raise UserError(
                f"no folder {model!r} here, and the hub cannot be reached: give a config.json"
            ) from None
        except EntryNotFoundError:
            return ""
        except HfHubHTTPError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the hub has no model {model!r} for you: {reason}") from None

    text = fetch("config.json")
    if not text:
        raise UserError(f"the hub's {model!r} has no config.json")
    return Source(model, json.loads(text), fetch(CARD), fetch(LICENSES[0]))
