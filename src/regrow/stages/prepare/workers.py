"""Processes that tokenize shards."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from types import TracebackType

from transformers import PreTrainedTokenizerBase

from regrow.data.documents import Passage
from regrow.data.prepared import write_shard
from regrow.errors import UserError

AHEAD = 2
"""Shards of text in memory at most, for each process."""
_tokenizers: list[PreTrainedTokenizerBase] = []  # in a worker: the one that it was started with


def number_of(workers: int) -> int:
    """The number of processes; 0 stands for one for each core that this process may use."""
    if workers < 0:
        raise UserError(f"workers {workers}: give a number of processes, or 0 for one each core")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return workers or cores or 1


class Workers:
    """Writes shards in `count` processes; with one, in this process."""

    def __init__(self, count: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.count, self.tokenizer = count, tokenizer
        self.pool: ProcessPoolExecutor | None = None
        self.waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Workers:
        if self.count > 1:
            self.pool = ProcessPoolExecutor(
                self.count, get_context("spawn"), initializer=_start, initargs=(self.tokenizer,)
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def write(self, folder: Path, number: int, passages: Sequence[tuple[Passage, float]]) -> None:
        """Write a shard now or soon; waits while too many are waiting, and raises their errors."""
        if self.pool is None:
            write_shard(folder, number, passages, self.tokenizer)
            return
        self._wait(AHEAD * self.count - 1)
        try:
            self.waiting.append(self.pool.submit(_write, folder, number, passages))
        except BrokenProcessPool:
            raise _ended() from None

    def finish(self) -> None:
        """Wait until all shards are written; raises the first error of a worker."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        while len(self.waiting) > most:
            try:
                self.waiting.popleft().result()
            except BrokenProcessPool:
                raise _ended() from None


def _ended() -> UserError:
    return UserError(
        "a process that tokenizes has ended, perhaps for lack of memory: run the same command with "
        "fewer --workers; finished shards are kept"
    )


def _start(tokenizer: PreTrainedTokenizerBase) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizers[:] = [tokenizer]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, also if that one was killed."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _write(folder: Path, number: int, passages: Sequence[tuple[Passage, float]]) -> None:
    write_shard(folder, number, passages, _tokenizers[0])
