"""Wraps llama.cpp, through the cyllama wheel: opens GGUF files, tokenizes, computes, quantizes.

cyllama has no call for the logits of all positions at once, and its `get_logits_ith` reads an
attribute `n_vocab` that its own model class lacks. All uses of cyllama are in this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from regrow.errors import UserError

if TYPE_CHECKING:
    import numpy as np

BATCH = 512
"""Number of tokens computed at once, equal to llama.cpp's default n_ubatch."""
ERROR = 4
"""llama.cpp's log level for errors."""
_errors: list[str] = []


def installed() -> bool:
    """Whether llama.cpp is installed, which is the extra `llama`."""
    return find_spec("cyllama") is not None


def require(task: str) -> None:
    """Raise UserError when llama.cpp, which is needed for `task`, is not installed."""
    if not installed():
        raise UserError(f"{task} needs llama.cpp: pip install 'regrow[llama]'")


def threads() -> int:
    """Number of threads: OMP_NUM_THREADS, or else the number of cores this process may use."""
    variable = os.environ.get("OMP_NUM_THREADS", "")
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return int(variable) if variable.isdigit() and int(variable) > 0 else cores


class GgufModel:
    """A GGUF file opened by llama.cpp on the CPU; a context manager.

    Memory is reserved for `context` tokens, and later for more tokens when a call needs them. With
    `only_look` the weights are not read from the file, and no memory is reserved yet.
    Raises UserError, in one line, for a file that llama.cpp cannot load.
    """

    def __init__(
        self,
        path: str | Path,
        context: int = 512,
        num_threads: int | None = None,
        only_look: bool = False,
    ):
        require(f"opening {path}")
        self._api = _api()
        self.path, self.num_threads = Path(path), num_threads or threads()
        if not self.path.is_file():
            raise UserError(f"no such GGUF file: {path}")
        parameters = self._api.LlamaModelParams()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = not only_look  # repacking would read all weights now
        self._model = self._loaded(parameters)
        self._vocab = self._model.get_vocab()
        self._batch = self._api.LlamaBatch(n_tokens=BATCH, embd=0, n_seq_max=1)
        self._context: Any = None
        self._room = (0, 0)
        self._cached_tokens: list[int] = []
        if not only_look:
            self._reserve(context)

    def _loaded(self, parameters: Any) -> Any:
        class Model(self._api.LlamaModel):  # type: ignore[misc,name-defined]
            """Adds the vocabulary size, which LlamaContext reads from its model."""

            @property
            def n_vocab(self) -> int:
                return int(self.get_vocab().n_vocab)

        _errors.clear()
        try:
            return Model(str(self.path), parameters)
        except (ValueError, RuntimeError) as error:
            reason = _errors[0] if _errors else str(error).splitlines()[0]
            raise UserError(f"{self.path}: llama.cpp cannot load it: {reason}") from None

    def _reserve(self, tokens: int, sequences: int = 1) -> None:
        """Reserve memory for `tokens` tokens of each sequence; this may clear the KV cache."""
        if tokens <= self._room[0] and sequences == self._room[1]:
            return
        if self._context is not None:
            self._context.close()
        tokens = -(-tokens // 256) * 256
        parameters = self._api.LlamaContextParams()
        parameters.n_ctx, parameters.n_seq_max = tokens * sequences, sequences
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = self.num_threads
        self._context, self._room = (
            self._api.LlamaContext(self._model, parameters),
            (tokens, sequences),
        )
        self._cached_tokens = []

    @property
    def vocab_size(self) -> int:
        """Number of token ids V."""
        return int(self._vocab.n_vocab)

    @property
    def num_parameters(self) -> int:
        """Number of weights of all tensors in the file."""
        return int(self._model.n_params)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return int(self._model.size)

    @property
    def positions(self) -> int:
        """Context length in tokens for which the model was trained."""
        return int(self._model.n_ctx_train)

    @property
    def kind(self) -> str:
        """Architecture and type as llama.cpp names them, for instance `llama 256M Q4_1`."""
        return str(self._model.desc)

    def tokens(self) -> list[str]:
        """The string of each token, as stored in the file."""
        return [self._vocab.get_text(token) for token in range(self.vocab_size)]

    def ends(self) -> set[int]:
        """Token ids that end a generation."""
        return {token for token in range(self.vocab_size) if self._vocab.is_eog(token)}

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text, without adding special tokens.

        The text of a special token is plain text; with `special` it becomes that special token.
        """
        ids: list[int] = self._vocab.tokenize(text, False, special)
        return ids

    def logits(self, tokens: list[int], start: int = 0) -> np.ndarray:
        """Logits [T − start, V] in float32 of the next token after each of `tokens[start:]`.

        The common prefix with the tokens of the last call is not computed again.
        """
        import numpy as np

        assert 0 <= start < len(tokens), (start, len(tokens))
        self._reserve(len(tokens))
        same = 0
        for token, cached in zip(tokens[:start], self._cached_tokens, strict=False):
            if token != cached:
                break
            same += 1
        self._cached_tokens = []  # stays empty if decoding fails
        if same == 0 or not self._context.memory_seq_rm(0, same, -1):
            self._context.kv_cache_clear()
            same = 0
        out = np.empty((len(tokens) - start, self.vocab_size), dtype=np.float32)
        for begin in range(same, len(tokens), BATCH):
            part = tokens[begin : begin + BATCH]
            self._batch.clear()
            for place, token in enumerate(part, start=begin):
                self._batch.add(token, place, [0], place >= start)
            self._context.decode(self._batch)
            for place in range(max(begin, start), begin + len(part)):
                row = self._context.get_logits_ith(place - begin)
                out[place - start] = np.fromiter(row, np.float32, self.vocab_size)
        self._cached_tokens = list(tokens)
        return out

    def continuation(self, tokens: list[int]) -> Iterator[int]:
        """Yield the greedy continuation of `tokens`, one token id at a time, without end."""
        tokens = list(tokens)
        while True:
            if len(tokens) > self._room[0]:
                self._reserve(2 * len(tokens))
            tokens.append(int(self.logits(tokens, len(tokens) - 1).argmax()))
            yield tokens[-1]

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The first `count` token ids of the greedy continuation of `tokens`."""
        self._reserve(len(tokens) + count)
        return list(islice(self.continuation(tokens), count))

    def feed(self, rows: list[list[int]], past: int, room: int) -> None:
        """Compute B sequences of equal length, after `past` earlier tokens of each sequence.

        `room` is the final length of the sequences. The logits after the last token of each
        sequence are computed but not fetched; this method serves to measure time.
        """
        self._reserve(room, len(rows))
        self._cached_tokens = []
        if past == 0:
            self._context.kv_cache_clear()
        inputs = [
            (token, past + number, sequence, number == len(row) - 1)
            for sequence, row in enumerate(rows)
            for number, token in enumerate(row)
        ]
        for begin in range(0, len(inputs), BATCH):
            self._batch.clear()
            for token, place, sequence, last in inputs[begin : begin + BATCH]:
                self._batch.add(token, place, [sequence], last)
            self._context.decode(self._batch)
        self._context.synchronize()

    def close(self) -> None:
        """Release the memory."""
        for part in (self._batch, self._context, self._model):
            if part is not None:
                part.close()

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def quantize(source: Path, target: Path, file_type: int, num_threads: int | None = None) -> None:
    """Quantize a GGUF file of F32, F16 or BF16 tensors to a llama_ftype, by llama.cpp's quantizer.

    Raises UserError with llama.cpp's error message when it fails.
    """
    require("quantizing to K-quants")
    api = _api()
    parameters = api.LlamaModelQuantizeParams()
    parameters.ftype = file_type
    parameters.nthread = num_threads or threads()
    _errors.clear()
    try:
        api.model_quantize(str(source), str(target), parameters)
    except RuntimeError as error:
        reason = _errors[0] if _errors else str(error).splitlines()[0]
        raise UserError(f"llama.cpp could not quantize to {target}: {reason}") from None


def _api() -> Any:
    """cyllama's module; its log is not printed, and the errors in it are collected."""
    from cyllama.llama import llama_cpp

    def keep(level: int, text: str) -> None:
        if level == ERROR and len(_errors) < 16:
            _errors.append(text.strip())

    llama_cpp.set_log_callback(keep)
    return llama_cpp
