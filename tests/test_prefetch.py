"""Weights that come to a device part by part: the right ones, in every order that events allow."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest
import torch
from pretend_cuda import FakeCuda
from pretend_streams import FakeStreams
from torch import Tensor

from regrow.runtime import prefetch
from regrow.runtime.prefetch import Prefetch

CUDA = torch.device("cuda")
SEEDS = range(12)
PARTS = [
    {
        "weight": torch.arange(n * 100, n * 100 + 6 + n, dtype=torch.bfloat16).view(-1, 1),
        "scale": torch.tensor(float(n)),
        "bias": torch.full((3, 2), n, dtype=torch.float64),
    }
    for n in range(5)
]


@pytest.fixture(autouse=True)
def no_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "device", lambda *_: torch.no_grad())


class Uses:
    """Takes parts, and notes what the device sees when it computes with them."""

    def __init__(self, streams: FakeStreams, parts: list[dict[str, Tensor]] = PARTS) -> None:
        self.streams, self.parts, self.reads = streams, parts, list[int]()
        self.prefetch = Prefetch(self._read, len(parts), CUDA)
        self.used: list[int] = []
        self.seen: list[dict[str, Tensor]] = []

    def _read(self, number: int) -> dict[str, Tensor]:
        self.reads.append(number)
        return self.parts[number]

    def use(self, number: int, release: bool = True) -> None:
        tensors = self.prefetch.take(number)
        self.used.append(number)
        for _ in range(2):  # two kernels, between which anything may run
            self.streams.compute.enqueue(
                lambda: self.seen.append({name: each.clone() for name, each in tensors.items()})
            )
        if release:
            self.prefetch.release(number)
        for _ in range(self.streams.random.randrange(4)):
            self.streams.step()

    def check(self) -> None:
        self.streams.finish()
        expected = [self.parts[number] for number in self.used for _ in range(2)]
        for number, (found, right) in enumerate(zip(self.seen, expected, strict=True)):
            for name, value in right.items():
                assert found[name].dtype == value.dtype
                assert torch.equal(found[name].cpu(), value), (number, name)


ORDERS: dict[str, Iterable[int]] = {
    "two passes": [*range(5), *range(5)],
    "some are skipped": [0, 1, 3, 4, 0, 2, 4, 0],
    "backwards": [4, 3, 2, 1, 0],
    "the same again": [0, 0, 1, 1, 1, 2],
    "stopped in the middle": [0, 1, 2, 0, 1, 2, 3, 4, 0],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_device_sees_the_right_part(
    order: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeCuda(), FakeStreams(seed).install(monkeypatch) as streams:
        uses = Uses(streams)
        for number in ORDERS[order]:
            uses.use(number)
        uses.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_part_is_used_after_an_exception(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes with a part raises, so that nothing releases it; then the pass begins again."""
    with FakeCuda(), FakeStreams(seed).install(monkeypatch) as streams:
        uses = Uses(streams)
        uses.use(0)
        uses.use(1, release=False)
        for number in (0, 1, 2, 3):
            uses.use(number)
        uses.use(3, release=False)
        uses.use(4)
        uses.check()


def test_the_next_part_is_copied_while_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the one after that is read by a thread; each part is read once in a pass."""
    with FakeCuda(), FakeStreams(0).install(monkeypatch) as streams:
        uses = Uses(streams)
        for number in range(5):
            tensors = uses.prefetch.take(number)
            streams.compute.enqueue(lambda tensors=tensors: None)  # type: ignore[misc]
            while streams.step():
                pass
            streams.compute.enqueue(lambda: None)  # the device still computes
            copies = streams.copies
            uses.prefetch.release(number)
            assert streams.copies == copies + 1
            assert uses.prefetch.copied == (number + 1) % 5
        assert uses.prefetch.reading is not None
        uses.prefetch.reading[1].result()
        assert uses.reads == [0, 1, 2, 3, 4, 0, 1]
        streams.finish()


def test_two_parts_are_on_the_device_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers grow with the parts, and have no more than the two largest ones."""
    generator = torch.Generator().manual_seed(0)
    sizes = [300, 900, 500, 1400, 100]
    parts = [
        {"a": torch.randn(n, generator=generator), "b": torch.randn(n, generator=generator)}
        for n in sizes
    ]
    with FakeCuda() as fake, FakeStreams(3).install(monkeypatch) as streams:
        uses, clones = Uses(streams, parts), 0
        for number in [*range(5), *range(5)]:
            uses.seen.clear()
            uses.used.clear()
            clones = max(clones, 2 * 8 * sizes[number])
            uses.use(number)
            uses.check()
        uses.seen.clear()
        assert 2 * 8 * 1400 <= fake.allocated() <= 2 * (8 * 1400 + 2 * prefetch.ALIGNMENT)
        assert fake.peak <= clones + 2 * (8 * 1400 + 2 * prefetch.ALIGNMENT)
        assert all(fake.is_there(each) for each in uses.prefetch.take(0).values())


def test_an_error_of_reading_is_raised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda(), FakeStreams(1).install(monkeypatch) as streams:
        uses, broken = Uses(streams), threading.Event()

        def read(number: int) -> dict[str, Tensor]:
            if broken.is_set():
                raise OSError("the file is gone")
            return PARTS[number]

        uses.prefetch.read = read
        broken.set()
        with pytest.raises(OSError, match="gone"):
            uses.prefetch.take(0)
        broken.clear()
        for number in range(5):
            uses.use(number)
        uses.check()


def test_memory_that_cannot_be_pinned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    plain, asked = torch.empty, []

    def empty(size: int, dtype: torch.dtype, pin_memory: bool = False) -> Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return plain(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    assert prefetch.pinned(2_000_000).shape == (2_000_000,)
    assert asked == [True, False]
    said = capsys.readouterr().err.strip()
    assert said == (
        "2 MB of the host's memory could not be pinned (CUDA error: out of memory): copies to the "
        "GPU are slower"
    )
