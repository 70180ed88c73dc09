"""Watch a run from another terminal, by the files that it writes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from regrow.watch.state import read
from regrow.watch.view import frame

WIDTH = 100
"""Columns where no terminal tells its own."""


def watch(folder: str | Path, once: bool = False, every: float = 2.0) -> None:
    """Show a run on stdout, anew each `every` seconds, until it is complete.

    One frame alone when `once`, and where stdout is no terminal. Raises UserError for a folder that
    is no run.
    """
    folder = Path(folder)
    state = read(folder)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH)
    if once or not sys.stdout.isatty():
        console.print(frame(state))
        return
    with Live(frame(state), console=console, auto_refresh=False) as live:
        while not state.complete:
            time.sleep(every)
            state = read(folder)
            live.update(frame(state), refresh=True)
