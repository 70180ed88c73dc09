"""One frame of a run on the terminal."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from regrow.progress import clock
from regrow.watch.state import RunState, StageState, Training

LOOK = {
    "done": ("✓ done", "green"),
    "running": ("▶ running", "bold cyan"),
    "waiting": ("· waiting", "dim"),
    "earlier": ("↺ of an earlier run", "dim"),
}
BLOCKS = "▁▂▃▄▅▆▇█"
POINTS = 40
QUIET = 60.0
"""Seconds from which on it is said that nothing was written."""


def frame(state: RunState) -> RenderableType:
    """Stages and the distillation, as they stand."""
    title = Text(f"{plain(str(state.folder))}  ({plain(state.model)})", style="bold")
    parts: list[RenderableType] = [title, _stages(state.stages)]
    if state.training is not None:
        parts += _training(state.training)
    if state.complete:
        parts.append(Text("complete", style="bold green"))
    elif state.quiet > QUIET:
        parts.append(Text(f"nothing written for {clock(state.quiet)}", style="yellow"))
    return Group(*parts)


def plain(text: str) -> str:
    """Text without what would move a terminal's cursor or change its colours."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def sparkline(values: list[float], points: int = POINTS) -> str:
    """Values as a row of blocks from least to most; of many every few, the last among them."""
    values = [value for value in values if math.isfinite(value)]
    step = max(1, math.ceil(len(values) / points))
    shown = values[::-1][::step][::-1]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in shown)


def _stages(stages: list[StageState]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for stage in stages:
        words, style = LOOK[stage.how]
        took = "" if stage.seconds is None else clock(stage.seconds)
        table.add_row(Text(plain(stage.name)), Text(words, style=style), Text(took))
    return table


def _training(training: Training) -> list[RenderableType]:
    rate = "–" if training.rate is None else f"{training.rate:,.0f} tokens/s"
    eta = "–" if training.eta is None else clock(training.eta)
    share = training.tokens / training.total
    head = f"{plain(training.stage)}  {share:.0%}  {training.tokens:,}/{training.total:,} tokens"
    tail = f"  {rate}" + (f"  ETA {eta}" if training.tokens < training.total else "")
    bar = Table.grid()
    bar.add_row(ProgressBar(total=training.total, completed=training.tokens, width=POINTS))
    found: list[RenderableType] = [Text(""), Text(head + tail), bar]
    if training.losses:
        pairs = [f"{plain(name)} {value:.4g}" for name, value in training.losses.items()]
        found.append(Text("  ".join(pairs)))
    if training.heldout:
        first, last = training.heldout[0], training.heldout[-1]
        line = f"held-out KL {first:.4f} → {last:.4f}  {sparkline(training.heldout)}"
        found.append(Text(line))
    return found
