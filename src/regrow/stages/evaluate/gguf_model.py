"""A GGUF file under evaluation, run by llama.cpp.

Shapes: T tokens, N scored tokens, V vocabulary. Logits are computed in chunks, never for all tokens
at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from regrow.checkpoint import Checkpoint, identity, load
from regrow.errors import UserError
from regrow.llama_cpp import GgufModel, require, threads
from regrow.runtime import distributed
from regrow.runtime.greedy import until
from regrow.runtime.progress import Progress
from regrow.stages.evaluate.eval_model import EvalModel, now
from regrow.stages.evaluate.texts import IGNORED, Text

ENDING = ".gguf"


class GgufFile:
    """A GGUF file for llama.cpp; the constructor reads only its sizes and tokens.

    Raises UserError, in one line, if llama.cpp is not installed or cannot load the file because it
    is truncated or not GGUF.
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

    @property
    def bytes(self) -> int:
        """Size of the file in bytes."""
        return self.folder.stat().st_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all bytes of the file."""
        return identity.of_file(self.folder).sha256

    def has_tokens_of(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether each token of a folder's tokenizer has the same id in this file."""
        size = len(self.tokens)
        vocabulary = tokenizer.get_vocab()
        return all(i < size and self.tokens[i] == token for token, i in vocabulary.items())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the file, as read by transformers.

        Raises UserError if transformers cannot read it.
        """
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(self.folder.parent), gguf_file=self.folder.name, local_files_only=True
            )
        except (ValueError, OSError, KeyError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"transformers cannot read the tokenizer in {self.folder} ({reason}): add the "
                "folder that the file was made from to the models"
            ) from None
        return tokenizer


def open_model(source: str | Path) -> Checkpoint | GgufFile:
    """Open NAME.gguf for llama.cpp, and any other source for transformers.

    Raises UserError if the source is neither.
    """
    if str(source).endswith(ENDING) and not Path(source).expanduser().is_dir():
        return GgufFile(source)
    return load(source, quantized=True)


ROWS = 256
"""Maximum number of positions whose logits are in memory at once."""


class GgufEvalModel(EvalModel):
    """A GGUF file and its texts; `texts` are tokenized by `tokenizer`."""

    batch_size = 1
    device = torch.device("cpu")
    engine, next_tokens = "llama.cpp", "random"

    def __init__(self, label: str, file: GgufFile, *arguments: Any, **more: Any) -> None:
        super().__init__(label, *arguments, **more)
        self.file, self.source = file, file.folder
        self.arithmetic = f"llama.cpp, {threads()} threads"

    @cached_property
    def model(self) -> GgufModel:
        """The model, opened on first use."""
        return GgufModel(self.file.folder)

    def load(self) -> None:
        """Open the file if it is not open yet."""
        _ = self.model

    def unload(self) -> None:
        """Free the memory of the model; it is opened again on the next use."""
        if (model := self.__dict__.pop("model", None)) is not None:
            model.close()

    @property
    def hardware(self) -> str:
        """llama.cpp and its number of threads."""
        return self.arithmetic

    @property
    def bytes_to_load(self) -> float:
        """Size of the file in bytes."""
        return self.file.bytes

    def logits(self, text: Text, counter: Progress) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Logits of llama.cpp in float32; each document of a sequence is read separately."""
        for number in filter(self.has_window, range(len(text.sequences))):
            for logits_NV, targets_N in self._scored(text.sequences[number], counter):
                yield number, logits_NV, targets_N

    def _scored(
        self, sequence: dict[str, Tensor], counter: Progress
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits [N, V] that predict the scored tokens of a sequence, and the tokens [N]."""
        length = int(sequence["real"].sum())
        starts = torch.nonzero(sequence["position_ids"][:length] == 0).flatten().tolist()
        for begin, end in pairwise([*starts, length]):
            ids = sequence["input_ids"][begin:end].tolist()
            labels_T = sequence["labels"][begin:end]
            for first in range(0, len(ids), ROWS):
                last = min(first + ROWS, len(ids))
                targets = labels_T[first + 1 : last + 1]  # position t predicts token t + 1
                scored = targets != IGNORED
                if scored.any():
                    logits_TV = torch.from_numpy(self.model.logits(ids[:last], first))
                    yield logits_TV[: len(targets)][scored], targets[scored]
                counter.advance((last - first) * distributed.world_size())

    def continuation(self, ids: list[int], new_tokens: int) -> list[int]:
        """Uses llama.cpp's KV cache; stops at an end token of the file or the tokenizer."""
        return until(self.model.continuation(ids), new_tokens, self.ends)

    @cached_property
    def ends(self) -> set[int]:
        """Token ids that end a generation."""
        eos = self.tokenizer.eos_token_id
        return self.model.ends() | ({eos} if isinstance(eos, int) else set())

    def times(self, batch: int, prompt: int, new: int) -> list[float]:
        """All tokens are random, as in llama-bench, so no time is spent on choosing tokens."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, prompt + new)
        ids_BT = torch.randint(self.model.vocab_size, shape, generator=generator)
        times = [now(self.device)]
        past = 0
        for length in (prompt, *[1] * new):
            rows: list[list[int]] = ids_BT[:, past : past + length].tolist()
            self.model.feed(rows, past, prompt + new)
            past += length
            times.append(now(self.device))
        seconds: list[float] = numpy.diff(times).tolist()
        return seconds

    def flops(self, tokens: int, past: int = 0) -> int | None:
        """Always None: the FLOPs of a GGUF model are unknown."""
        return None
