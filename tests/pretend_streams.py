"""Pretended CUDA streams: what is enqueued runs later, in any order that the events allow.

Inside `FakeStreams` a copy with `non_blocking=True` waits in the queue of the current stream. Only
events decide what runs before what, so that a forgotten event shows as wrong numbers for some seed.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Mark:
    """One recording of an event."""

    def __init__(self) -> None:
        self.done = False


class FakeEvent:
    streams: FakeStreams

    def __init__(self, **_: Any) -> None:
        self.mark = Mark()
        self.mark.done = True

    def record(self, stream: FakeStream) -> None:
        self.mark = mark = Mark()
        stream.enqueue(lambda: setattr(mark, "done", True))

    def synchronize(self) -> None:
        self.streams.run_until(self.mark)


class FakeStream:
    """A queue of operations; a stream `at_once` runs them immediately, as the host does."""

    def __init__(self, streams: FakeStreams, at_once: bool = False) -> None:
        self.streams, self.at_once = streams, at_once
        self.queue: deque[Callable[[], None] | Mark] = deque()
        streams.all.append(self)

    def enqueue(self, operation: Callable[[], None]) -> None:
        if self.at_once:
            operation()
        else:
            self.queue.append(operation)

    def wait_event(self, event: FakeEvent) -> None:
        if self.at_once:
            event.synchronize()
        else:
            self.queue.append(event.mark)


class FakeStreams(TorchFunctionMode):
    """The streams of one pretended device."""

    def __init__(self, seed: int, at_once: bool = False) -> None:
        super().__init__()
        self.random, self.lock = random.Random(seed), threading.RLock()
        self.all: list[FakeStream] = []
        self.compute = self.current = FakeStream(self, at_once)
        self.copies = 0

    def install(self, patch: pytest.MonkeyPatch) -> FakeStreams:
        """Put the pretended streams and events into torch.cuda."""
        kind = type("Event", (FakeEvent,), {"streams": self})
        patch.setattr(torch.cuda, "Event", kind)
        patch.setattr(torch.cuda, "Stream", lambda *_: FakeStream(self))
        patch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "stream", self.use)
        return self

    @contextmanager
    def use(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.copy_ and kwargs.get("non_blocking"):
            target, source = args
            self.copies += 1
            self.current.enqueue(lambda: target.copy_(source))
            return target
        return func(*args, **kwargs)

    def step(self) -> bool:
        """Run one operation that may run now; False if there is none."""
        with self.lock:
            for stream in self.random.sample(self.all, len(self.all)):
                while stream.queue and isinstance(stream.queue[0], Mark):
                    if not stream.queue[0].done:
                        break
                    stream.queue.popleft()
                if stream.queue and callable(operation := stream.queue[0]):
                    stream.queue.popleft()
                    operation()
                    return True
        return False

    def run_until(self, mark: Mark) -> None:
        """Run until an event has happened, as `synchronize` does."""
        end = time.monotonic() + 20
        while not mark.done:
            if not self.step():
                assert time.monotonic() < end, "an event that never happens"
                time.sleep(1e-4)

    def finish(self) -> None:
        """Run all that is enqueued."""
        while self.step():
            pass
        assert not any(stream.queue for stream in self.all), "waits for what never happens"
