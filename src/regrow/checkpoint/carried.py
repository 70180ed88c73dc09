"""The files that a folder hands on beside its weights: tokenizer, templates, licences."""

from __future__ import annotations

import shutil
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A folder with one of these files has a tokenizer."""
OF_TOKENIZERS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)
OF_PROCESSORS = ("*processor_config.json",)
"""How a multimodal model reads images, videos and sound."""
CARRIED = (*OF_TOKENIZERS, *OF_PROCESSORS, "generation_config.json", "LICENSE*", "NOTICE*")
"""Files that are copied from a checkpoint to the checkpoints derived from it."""


def carry(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat templates, generation config and licences, unless `folder` has them."""
    for pattern in CARRIED:
        for path in source.glob(pattern):
            target = folder / path.relative_to(source)
            if path.is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
