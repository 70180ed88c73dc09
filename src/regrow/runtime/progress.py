"""Progress lines with rate and ETA: a live line on a terminal, otherwise a line every 10 s."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from regrow.runtime import distributed

FIRST = 1.0
"""Seconds after which the first line is printed, at the latest."""


class Progress:
    """Counts units (tokens, documents, …) and prints the progress to stderr.

    `total` is the expected number of units, or 0 if it is unknown.
    """

    def __init__(self, title: str, total: int, unit: str, interval: float | None = None) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self.live = sys.stderr.isatty()
        self.interval = interval if interval is not None else (0.5 if self.live else 10.0)
        self.start = time.monotonic()
        self.last = self.start + min(FIRST - self.interval, 0.0)
        self.first_done = 0
        self.shown = False

    def resume_at(self, done: int) -> None:
        """Start at `done` units from an earlier process; these are excluded from the rate."""
        self.done = self.first_done = done

    def advance(self, units: int, note: str = "") -> None:
        """Count `units` more; if a line is due, print share, rate, ETA and `note`."""
        self.done += units
        now = time.monotonic()
        if now - self.last >= self.interval:
            self.last, self.shown = now, True
            self._print(self.line(now, note), end="\r" if self.live else "\n")

    def seconds(self) -> float:
        """Seconds since the start of counting in this process."""
        return time.monotonic() - self.start

    def line(self, now: float, note: str = "") -> str:
        """Format the progress line at monotonic time `now` in seconds."""
        rate = (self.done - self.first_done) / max(now - self.start, 1e-9)
        pace = f"  {self._pace(rate)}" if rate > 0 else ""
        if self.total <= 0:
            return f"{self.title}: {self.done:,} {self.unit}{pace}  {note}".rstrip()
        left = clock((self.total - self.done) / rate) if rate > 0 else "unknown"
        text = f"{self.title}: {100 * self.done / self.total:3.0f} %"
        text += f"  {self.done:,}/{self.total:,} {self.unit}"
        return f"{text}{pace}  ETA {left}  {note}".rstrip()

    def finish(self, note: str = "") -> None:
        """Print the last line, with the total time."""
        seconds = self.seconds()
        rate = (self.done - self.first_done) / max(seconds, 1e-9)
        text = f"{self.title}: {self.done:,} {self.unit} in {clock(seconds)}"
        text += f" ({self._pace(rate)})"
        self._print(f"{text}  {note}".rstrip(), end="\n")

    def _pace(self, rate: float) -> str:
        """Format the rate as units per second or, if it is below one, seconds per unit."""
        return f"{rate:,.0f} {self.unit}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):,.0f} s each"

    def _print(self, text: str, end: str) -> None:
        pad = " " * max(0, 100 - len(text)) if self.live else ""
        if distributed.is_main():
            print(text + pad, end=end, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, unit: str = "tokens") -> Iterator[Progress]:
    """Yield a Progress that prints its last line if the work ends without an error."""
    counter = Progress(title, total, unit)
    yield counter
    counter.finish()


def say(text: str) -> None:
    """Print a message to stderr; stdout is reserved for results."""
    if distributed.is_main():
        print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Format seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
