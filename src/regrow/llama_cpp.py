"""Real llama.cpp, by the cyllama wheel: open a GGUF file, its tokens, its logits, K-quants.

cyllama has no call for the logits of all positions at once, and its `get_logits_ith` asks the model
for a `n_vocab` that its own class lacks; what is needed of it stands here and nowhere else.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from regrow.errors import UserError

if TYPE_CHECKING:
    import numpy as np

ERROR = 4
"""llama.cpp's log level of an error."""
_said: list[str] = []


def installed() -> bool:
    """Whether llama.cpp is there, from the extra `llama`."""
    return find_spec("cyllama") is not None


def require(what: str) -> None:
    """Raise UserError when llama.cpp, which is needed for `what`, is not installed."""
    if not installed():
        raise UserError(f"{what} needs llama.cpp: pip install 'regrow[llama]'")


def threads() -> int:
    """Threads to compute with: OMP_NUM_THREADS, else the cores that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return int(given) if given.isdigit() and int(given) > 0 else cores


class GgufModel:
    """A GGUF file opened by llama.cpp on the CPU; a context manager.

    Raises UserError, in one line, for a file that llama.cpp cannot load.
    """

    def __init__(self, path: str | Path, context: int = 512, num_threads: int | None = None):
        require(f"opening {path}")
        api = _api()
        self.path, self.context = Path(path), context
        if not self.path.is_file():
            raise UserError(f"no such GGUF file: {path}")
        parameters = api.LlamaModelParams()
        parameters.n_gpu_layers = 0
        self._model = self._loaded(api, parameters)
        self._vocab = self._model.get_vocab()
        wanted = api.LlamaContextParams()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = context
        wanted.n_threads = wanted.n_threads_batch = num_threads or threads()
        self._context = api.LlamaContext(self._model, wanted)
        self._batch = api.LlamaBatch(n_tokens=context, embd=0, n_seq_max=1)

    def _loaded(self, api: Any, parameters: Any) -> Any:
        class Model(api.LlamaModel):  # type: ignore[misc,name-defined]
            """With the size of its vocabulary, which LlamaContext asks it for."""

            @property
            def n_vocab(self) -> int:
                return int(self.get_vocab().n_vocab)

        _said.clear()
        try:
            return Model(str(self.path), parameters)
        except (ValueError, RuntimeError) as error:
            reason = _said[0] if _said else str(error).splitlines()[0]
            raise UserError(f"{self.path}: llama.cpp cannot load it: {reason}") from None

    @property
    def vocab_size(self) -> int:
        """Number of token ids V."""
        return int(self._vocab.n_vocab)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added, special ones in it as plain text."""
        found: list[int] = self._vocab.tokenize(text, False, False)
        return found

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits [T, V] in float32 of the next token after each of `tokens`, from an empty cache.

        At most `context` tokens.
        """
        import numpy as np

        assert 0 < len(tokens) <= self.context, (len(tokens), self.context)
        self._context.kv_cache_clear()
        self._run(tokens, 0, every=True)
        out = np.empty((len(tokens), self.vocab_size), dtype=np.float32)
        for row in range(len(tokens)):
            out[row] = self._context.get_logits_ith(row)
        return out

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The `count` most likely token ids after `tokens`, each after the ones before it."""
        import numpy as np

        assert 0 < len(tokens) + count <= self.context, (len(tokens), count, self.context)
        self._context.kv_cache_clear()
        found: list[int] = []
        fed, place = tokens, 0
        for _ in range(count):
            self._run(fed, place, every=False)
            place += len(fed)
            found.append(int(np.argmax(self._context.get_logits_ith(-1))))
            fed = found[-1:]
        return found

    def _run(self, tokens: list[int], start: int, every: bool) -> None:
        self._batch.clear()
        for number, token in enumerate(tokens):
            last = number == len(tokens) - 1
            self._batch.add(token, start + number, [0], every or last)
        self._context.decode(self._batch)

    def close(self) -> None:
        """Release the memory."""
        for part in (self._batch, self._context, self._model):
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
    """Quantize a GGUF file of F32 or F16 tensors to a llama_ftype, by llama.cpp's own quantizer.

    Raises UserError when it fails, with what llama.cpp said.
    """
    require("quantizing to K-quants")
    api = _api()
    wanted = api.LlamaModelQuantizeParams()
    wanted.ftype = file_type
    wanted.nthread = num_threads or threads()
    _said.clear()
    try:
        api.model_quantize(str(source), str(target), wanted)
    except RuntimeError as error:
        reason = _said[0] if _said else str(error).splitlines()[0]
        raise UserError(f"llama.cpp could not quantize to {target}: {reason}") from None


def _api() -> Any:
    """cyllama's module, its log kept from the terminal; the errors in it are remembered."""
    from cyllama.llama import llama_cpp

    def keep(level: int, text: str) -> None:
        if level == ERROR and len(_said) < 16:
            _said.append(text.strip())

    llama_cpp.set_log_callback(keep)
    return llama_cpp
