"""`regrow watch`: show the progress of a run in another terminal.

The progress comes from the files of the run: recipe, manifests, partial folders and metrics. The
lock on the run tells whether its process is still there.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from regrow import stage_dir
from regrow.errors import UserError
from regrow.recipe import recipe as recipes
from regrow.recipe.recipe import RECIPE
from regrow.runtime import lock
from regrow.runtime.progress import clock
from regrow.stage import Step
from regrow.stages.report.run_folder import METRICS, rows

Progress = Literal["done", "running", "stopped", "waiting", "earlier"]
"""`earlier`: completed by an earlier run in this folder, and not yet checked by this run."""

RECENT = 50
"""Number of logged steps for the token rate."""
SETTLED = 60.0
"""After this many seconds without a write, a report older than its recipe counts as current."""
MAKES_MODEL = ("rotate", "prune", "sparsify", "distill", "quantize")


@dataclass(frozen=True)
class StageState:
    """State of one stage; `seconds` is its duration, or the time since its start if it runs, or
    from its start to the last write if it was stopped."""

    name: str
    progress: Progress
    seconds: float | None = None


@dataclass(frozen=True)
class Training:
    """State of the running distillation or, if none is running, of the last one."""

    stage: str
    tokens: int
    total: int
    rate: float | None
    """Tokens per second over the last steps; None before the second step."""
    eta: float | None
    """Seconds left; None if the rate is unknown, 0 at the end."""
    losses: dict[str, float] = field(default_factory=dict)
    """Last logged values by name."""
    heldout: list[float] = field(default_factory=list)
    """All held-out KL values so far."""


@dataclass(frozen=True)
class RunState:
    """State of a run."""

    folder: Path
    model: str
    stages: list[StageState]
    training: Training | None
    complete: bool
    stopped: bool
    """Whether the run is not complete and its process has ended."""
    quiet: float
    """Seconds since the last write."""


def read(folder: Path, now: float | None = None) -> RunState:
    """Read the state of the run in `folder` at time `now` (seconds since the epoch; default: now).

    Raises UserError if the folder has no run.
    """
    now = time.time() if now is None else now
    if not (folder / RECIPE).is_file():
        raise UserError(
            f"{folder} is no run: expected {RECIPE} in it, or it has just been started and is "
            "still checking its recipe; give the folder of regrow run --out"
        )
    ended = lock.state(folder / stage_dir.LOCK) == "free"  # before the files that it writes last
    recipe = recipes.read(folder / RECIPE)
    steps = [(f"{n:02d}-{step.name}", step) for n, step in enumerate(recipe.steps(), start=1)]
    quiet = max(0.0, now - _last_write(folder))
    begun = (folder / RECIPE).stat().st_mtime
    stages: list[StageState] = []
    running = False
    at_work: Progress = "stopped" if ended else "running"
    until = now - quiet if ended else now
    for name, step in steps:
        done = _done(folder, name, step, quiet)
        if done is None or _partial(folder, name):
            progress: Progress = "waiting" if running else at_work
            stages.append(StageState(name, progress, None if running else max(0.0, until - begun)))
            running = True
        else:
            stages.append(StageState(name, "earlier" if running else "done", done[0]))
            begun = max(begun, done[1])
    complete = not running and _published(folder, steps)
    return RunState(
        folder=folder,
        model=recipe.model,
        stages=stages,
        training=_training(folder, dict(steps), stages, now),
        complete=complete,
        stopped=ended and not complete,
        quiet=quiet,
    )


def _folders(name: str, step: Step) -> list[str]:
    """Folders of a stage; a prune with repair writes two, the one without repair last."""
    if step.name == "report":
        return []
    return [f"{name}-repaired", name] if step.name == "prune" and step.config.repair else [name]


def _done(folder: Path, name: str, step: Step, quiet: float) -> tuple[float, float] | None:
    """Duration in seconds and completion time of a stage; None if it is not complete."""
    if step.name == "report":
        page, recipe = folder / "report.html", folder / RECIPE
        if not page.exists():
            return None
        written = page.stat().st_mtime
        fresh = written >= recipe.stat().st_mtime or quiet > SETTLED
        return (0.0, written) if fresh else None
    paths = [folder / "stages" / one for one in _folders(name, step)]
    manifests = [stage_dir.read(path) for path in paths]
    if any(manifest is None for manifest in manifests):
        return None
    times = [(path / stage_dir.NAME).stat().st_mtime for path in paths]
    return sum(float(each.get("seconds", 0.0)) for each in manifests if each), max(times)


def _partial(folder: Path, name: str) -> bool:
    stages = folder / "stages"
    return any((stages / f".{one}.partial").is_dir() for one in (name, f"{name}-repaired"))


def _published(folder: Path, steps: list[tuple[str, Step]]) -> bool:
    """Whether model/ is the model of the last stage, or no stage writes a model."""
    makers = [(name, step) for name, step in steps if step.name in MAKES_MODEL]
    if not makers:
        return True
    last = stage_dir.read(folder / "stages" / _folders(*makers[-1])[0])
    there = stage_dir.read(folder / "model")
    return None not in (last, there) and last["finished"] == there["finished"]  # type: ignore[index]


def _last_write(folder: Path) -> float:
    """Time of the last change of the run's files, including partial folders."""
    places = [folder, *folder.glob("*"), *folder.glob("stages/*"), *folder.glob("stages/.*/*")]
    return max(_changed(place) for place in places)


def _changed(place: Path) -> float:
    try:
        return place.stat().st_mtime
    except FileNotFoundError:  # a partial folder was renamed in the meantime
        return 0.0


def _training(
    folder: Path, steps: dict[str, Step], stages: list[StageState], now: float
) -> Training | None:
    """State of the running distillation or, if none is running, of the last one, if any."""
    path = folder / METRICS
    logged = [row for row in rows(path) if row.get("stage") in steps and "tokens" in row]
    named = dict.fromkeys(row["stage"] for row in logged)
    running = [stage.name for stage in stages if stage.progress in ("running", "stopped")]
    stage = next((name for name in running if name in named), None) or next(reversed(named), None)
    if stage is None:
        return None
    mine = [row for row in logged if row["stage"] == stage]
    config = steps[stage].config
    total = max(1, round(config.tokens / config.batch_tokens)) * config.batch_tokens
    tokens, rate = int(mine[-1]["tokens"]), _rate(mine)
    left = None if rate is None else max(0.0, (total - tokens) / rate - (now - _changed(path)))
    return Training(
        stage=stage,
        tokens=tokens,
        total=total,
        rate=rate,
        eta=0.0 if tokens >= total else left,
        losses=_losses(mine),
        heldout=[float(row["heldout_kl"]) for row in mine if "heldout_kl" in row],
    )


def _rate(mine: list[dict[str, Any]]) -> float | None:
    """Tokens/s over the last steps of the last process, as each process counts seconds from 0."""
    last = [row for row in mine if "loss" in row][-RECENT:]
    restarts = [n for n in range(1, len(last)) if last[n]["seconds"] < last[n - 1]["seconds"]]
    same = last[restarts[-1] if restarts else 0 :]
    if len(same) < 2 or same[-1]["seconds"] <= same[0]["seconds"]:
        return None
    return float(
        (same[-1]["tokens"] - same[0]["tokens"]) / (same[-1]["seconds"] - same[0]["seconds"])
    )


def _losses(mine: list[dict[str, Any]]) -> dict[str, float]:
    """Losses, feature losses, learning rate and gradient norm of the last logged step."""
    last: dict[str, Any] = next((row for row in reversed(mine) if "loss" in row), {})
    plain = ("stage", "step", "tokens", "seconds", "epoch")
    return {name: float(value) for name, value in last.items() if name not in plain}


LOOK = {
    "done": ("✓ done", "green"),
    "running": ("▶ running", "bold cyan"),
    "stopped": ("■ stopped", "yellow"),
    "waiting": ("· waiting", "dim"),
    "earlier": ("↺ by an earlier run", "dim"),
}
BLOCKS = "▁▂▃▄▅▆▇█"
POINTS = 40
QUIET = 60.0
"""After this many seconds without a write, the frame shows a remark."""


def frame(state: RunState) -> RenderableType:
    """Render the stages and the distillation."""
    title = Text(f"{plain(str(state.folder))}  ({plain(state.model)})", style="bold")
    parts: list[RenderableType] = [title, _stages(state.stages)]
    if state.training is not None:
        parts += _training_lines(state.training, state.stopped)
    if state.complete:
        parts.append(Text("complete", style="bold green"))
    elif state.stopped:
        parts.append(Text("■ stopped; the same command continues it", style="yellow"))
    elif state.quiet > QUIET:
        parts.append(Text(f"nothing written for {clock(state.quiet)}", style="yellow"))
    return Group(*parts)


def plain(text: str) -> str:
    """Replace control characters, which could affect the terminal."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def sparkline(values: list[float], points: int = POINTS) -> str:
    """Show values as a row of bars; at most `points` of them, including the last one."""
    values = [value for value in values if math.isfinite(value)]
    step = max(1, math.ceil(len(values) / points))
    shown = values[::-1][::step][::-1]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in shown)


def _stages(stages: list[StageState]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for stage in stages:
        words, style = LOOK[stage.progress]
        took = "" if stage.seconds is None else clock(stage.seconds)
        table.add_row(Text(plain(stage.name)), Text(words, style=style), Text(took))
    return table


def _training_lines(training: Training, stopped: bool) -> list[RenderableType]:
    rate = "–" if training.rate is None else f"{training.rate:,.0f} tokens/s"
    eta = "–" if training.eta is None else clock(training.eta)
    share = training.tokens / training.total
    head = f"{plain(training.stage)}  {share:.0%}  {training.tokens:,}/{training.total:,} tokens"
    unfinished = training.tokens < training.total and not stopped
    tail = f"  {rate}" + (f"  ETA {eta}" if unfinished else "")
    bar = Table.grid()
    bar.add_row(ProgressBar(total=training.total, completed=training.tokens, width=POINTS))
    lines: list[RenderableType] = [Text(""), Text(head + tail), bar]
    if training.losses:
        pairs = [f"{plain(name)} {value:.4g}" for name, value in training.losses.items()]
        lines.append(Text("  ".join(pairs)))
    if training.heldout:
        first, last = training.heldout[0], training.heldout[-1]
        line = f"held-out KL {first:.4f} → {last:.4f}  {sparkline(training.heldout)}"
        lines.append(Text(line))
    return lines


WIDTH = 100
"""Number of columns if stdout is not a terminal."""


def watch(folder: str | Path, once: bool = False, every: float = 2.0) -> None:
    """Show a run on stdout, refreshed every `every` seconds, until it is complete or stopped.

    Shows only one frame if `once` is set or stdout is not a terminal. Raises UserError if the
    folder is not a run.
    """
    folder = Path(folder)
    state = read(folder)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH)
    if once or not sys.stdout.isatty():
        console.print(frame(state))
        return
    with Live(frame(state), console=console, auto_refresh=False) as live:
        while not (state.complete or state.stopped):
            time.sleep(every)
            state = read(folder)
            live.update(frame(state), refresh=True)
