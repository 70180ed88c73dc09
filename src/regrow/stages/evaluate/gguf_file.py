"""A GGUF file among the models of an evaluation: what is known of it before it is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from regrow.checkpoint import Checkpoint, load
from regrow.errors import UserError
from regrow.llama_cpp import GgufModel, require

ENDING = ".gguf"
SAMPLES = 64
SAMPLE_BYTES = 1 << 16


class GgufFile:
    """A GGUF file that llama.cpp will measure.

    Raises UserError, in one line, when llama.cpp is not installed or cannot load the file: it is
    cut off, or no GGUF.
    """

    def __init__(self, path: str | Path) -> None:
        require(f"measuring {path}")
        self.folder = Path(path).expanduser()
        with GgufModel(self.folder, only_look=True) as opened:
            self.tokens = opened.tokens()
            self.kind, self.parameters = opened.kind, opened.num_parameters
            self.tensor_bytes = opened.tensor_bytes
            self.config: dict[str, Any] = {
                "vocab_size": opened.vocab_size,
                "max_position_embeddings": opened.positions,
            }
        self.parent: Checkpoint | None = None
        """A folder with the same tokens, whose tokenizer is taken."""

    @property
    def bytes(self) -> int:
        """Bytes of the file."""
        return self.folder.stat().st_size

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file's size and of samples of its bytes."""
        seen = hashlib.sha256(str(self.bytes).encode())
        with self.folder.open("rb") as file:
            for place in range(0, self.bytes, max(self.bytes // SAMPLES, 1)):
                file.seek(place)
                seen.update(file.read(SAMPLE_BYTES))
        return seen.hexdigest()

    def has_tokens_of(self, checkpoint: Checkpoint) -> bool:
        """Whether each token of a folder's tokenizer stands under its id in the file."""
        vocabulary = checkpoint.tokenizer().get_vocab()
        known = len(self.tokens)
        return all(i < known and self.tokens[i] == token for token, i in vocabulary.items())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The parent's tokenizer, else what transformers reads from the file.

        Raises UserError when it cannot.
        """
        if self.parent is not None:
            return self.parent.tokenizer()
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(self.folder.parent), gguf_file=self.folder.name, local_files_only=True
            )
        except (ValueError, OSError, KeyError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"transformers cannot read the tokenizer in {self.folder} ({reason}): name the "
                "folder that it was made of among the models, too"
            ) from None
        return tokenizer


def open_model(source: str | Path) -> Checkpoint | GgufFile:
    """A file NAME.gguf as llama.cpp will run it, anything else as transformers will.

    Raises UserError for what is neither.
    """
    if str(source).endswith(ENDING) and not Path(source).expanduser().is_dir():
        return GgufFile(source)
    return load(source, quantized=True)


def find_parents(models: Mapping[str, Checkpoint | GgufFile], teacher: str | None) -> None:
    """Give each GGUF file the first folder, the teacher's before others, that has its tokens."""
    labels = sorted(models, key=lambda label: label != teacher)
    folders = [model for label in labels if isinstance(model := models[label], Checkpoint)]
    for model in models.values():
        if isinstance(model, GgufFile):
            named = (folder for folder in folders if folder.has_tokenizer)
            model.parent = next((each for each in named if model.has_tokens_of(each)), None)
