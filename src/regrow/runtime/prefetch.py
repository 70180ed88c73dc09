"""Weights that come to a GPU part by part: the next part is copied while one is in use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from regrow.runtime.progress import say

ALIGNMENT = 512
"""Each tensor of a buffer begins at a multiple of this, as in torch's own allocator."""
NOTHING = torch.empty(0, dtype=torch.uint8)


class Prefetch:
    """The parts 0 … `count` − 1 of a model's weights, in two buffers on a CUDA device.

    `read` gives the tensors of a part by name, in the host's memory; a thread calls it. Parts are
    expected in their order, and again from the first one. While a part is in use, a stream of its
    own copies the part that follows, and the thread reads the one after that into pinned memory.
    Other orders give the same tensors, without the time saved.
    """

    def __init__(
        self, read: Callable[[int], dict[str, Tensor]], count: int, device: torch.device
    ) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.read, self.count, self.device = read, count, torch.device("cuda", index)
        self.stream = torch.cuda.Stream(self.device)
        self.thread = ThreadPoolExecutor(1, "prefetch")
        self.slot, self.other = _Slot(self.device), _Slot(self.device)
        """The buffers that the next part is read into, and those of the part before it."""
        self.reading: tuple[int, Future[None]] | None = None
        """The part that the thread reads into `slot`."""
        self.copied: int | None = None
        """The part whose copy was begun and that nothing uses yet; it is in `other`."""
        self.in_use: _Slot | None = None

    def take(self, number: int) -> dict[str, Tensor]:
        """The tensors of a part, for what the current stream computes until `release`."""
        self._free()
        if self.copied != number:
            self._copy(number)
        self.copied, self.in_use = None, self.other
        torch.cuda.current_stream(self.device).wait_event(self.other.copied)
        return self.other.tensors()

    def release(self, number: int) -> None:
        """End the use of a part, and begin to copy the next one."""
        self._free()
        self._copy((number + 1) % self.count)

    def _free(self) -> None:
        if self.in_use is not None:  # also after an exception, when nothing released the part
            self.in_use.used.record(torch.cuda.current_stream(self.device))
            self.in_use = None

    def _copy(self, number: int) -> None:
        """Begin to copy a part, as soon as it is read, and to read the one that follows."""
        reading, self.reading, self.copied = self.reading, None, None
        if reading is None or reading[0] != number:
            reading = self._begin(number)  # in the same buffer, when the thread has ended
        reading[1].result()
        self.slot.copy(self.stream)
        self.copied, self.slot, self.other = number, self.other, self.slot
        self.reading = self._begin((number + 1) % self.count)

    def _begin(self, number: int) -> tuple[int, Future[None]]:
        return number, self.thread.submit(self._read, number, self.slot)

    def _read(self, number: int, slot: _Slot) -> None:
        with torch.no_grad(), torch.cuda.device(self.device):
            slot.fill(self.read(number))


class _Place(NamedTuple):
    """Where a tensor lies in a buffer."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.begin : self.end].view(self.dtype).view(self.shape)


class _Slot:
    """A buffer in pinned memory and one on the device, both with the tensors of one part."""

    def __init__(self, device: torch.device) -> None:
        self.host, self.device = NOTHING, device
        self.there = NOTHING
        self.places: dict[str, _Place] = {}
        self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()
        """When the last copy to the device has ended, and when its last use has."""

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Write the tensors of a part into the host's buffer."""
        self.copied.synchronize()  # the buffer is read until then
        self.places, size = {}, 0
        for name, tensor in tensors.items():
            end = size + tensor.numel() * tensor.element_size()
            self.places[name] = _Place(size, end, tensor.dtype, tensor.shape)
            size = -(-end // ALIGNMENT) * ALIGNMENT
        if len(self.host) < size:
            self.host = NOTHING  # the old one goes first
            self.host = pinned(size)
        for name, tensor in tensors.items():
            self.places[name].of(self.host).copy_(tensor)

    def copy(self, stream: torch.cuda.Stream) -> None:
        """Copy the host's buffer to the device, after what last used the device's buffer."""
        with torch.cuda.stream(stream):
            if len(self.there) < len(self.host):
                self.used.synchronize()  # the memory must not be used when it is freed
                self.there = NOTHING
                self.there = torch.empty(len(self.host), dtype=torch.uint8, device=self.device)
            stream.wait_event(self.used)
            size = max((place.end for place in self.places.values()), default=0)
            self.there[:size].copy_(self.host[:size], non_blocking=True)
            self.copied.record(stream)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors on the device, as views of its buffer."""
        return {name: place.of(self.there) for name, place in self.places.items()}


def pinned(size: int) -> Tensor:
    """A buffer of `size` bytes in pinned memory, or in plain memory where none can be pinned."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        say(
            f"{size / 1e6:.0f} MB of the host's memory could not be pinned ({reason}): copies to "
            "the GPU are slower"
        )
        return torch.empty(size, dtype=torch.uint8)
