"""The tokenizer of a folder, read once for all folders with the same files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow import stage_dir
from regrow.checkpoint import identity
from regrow.checkpoint.carried import OF_TOKENIZERS, TOKENIZER_FILES
from regrow.checkpoint.model_config import read_json
from regrow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(folder: Path, classes: list[Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; `classes` are the config fields that decide its class.

    All folders with the same tokenizer files share one object. Raises UserError for a broken one.
    """
    patterns = (*OF_TOKENIZERS, "*.model", "*.tiktoken")
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    digests = {
        str(path.relative_to(folder)): identity.of_file(path).sha256
        for path in paths
        if path.is_file()
    }
    key = stage_dir.digest(digests, classes)
    if key not in _read:
        _read[key] = _open(folder)
    return _read[key]


_read: dict[str, PreTrainedTokenizerBase] = {}
"""The tokenizers that this process has loaded, by a digest of their files."""


def _open(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    present = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if present == ["tokenizer.model"] and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{folder / 'tokenizer.model'} cannot be read without tokenizer.json: put the model's "
            "tokenizer.json beside it, or pip install sentencepiece"
        )
    for path in sorted(folder.glob("tokenizer*.json")):
        read_json(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    return tokenizer
