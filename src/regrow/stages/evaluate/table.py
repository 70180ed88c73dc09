"""Tables of an evaluation for the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

ORDER = (
    "parameters",
    "bytes",
    "bits_per_weight",
    "zeros",
    "bytes_as_bitmask",
    "perplexity",
    "perplexity_per_reference_token",
    "bits_per_byte",
    "kl",
    "agreement",
)
DRAFT = ("acceptance", "accepted_length", "draft_speedup")
SPEED = (
    "prefill",
    "prefill_speedup",
    "prefill_of_flops",
    "decode",
    "decode_speedup",
    "decode_of_flops",
    "ttft",
    "ttft_p95",
    "time_per_output_token",
    "time_per_output_token_p95",
    "load_time",
    "peak_memory",
)
KEPT = "_kept"
"""Suffix of the kind of a figure that is a share of the teacher's score."""
TITLES = {
    "perplexity": "ppl",
    "perplexity_per_reference_token": "ppl/ref token",
    "bits_per_byte": "bits/byte",
    "kl": "KL",
    "agreement": "top-1 agreement",
    "exact_answers": "exact answers",
    "exact_answers_kept": "kept",
    "acceptance": "accepted",
    "accepted_length": "tokens/pass",
    "draft_speedup": "× speed by bytes",
    "bytes": "MB",
    "bits_per_weight": "bits/weight",
    "bytes_as_bitmask": "MB as bitmask",
    "prefill": "prefill tok/s",
    "decode": "decode tok/s",
    "prefill_speedup": "×",
    "decode_speedup": "×",
    "prefill_of_flops": "÷ FLOP ratio",
    "decode_of_flops": "÷ FLOP ratio",
    "ttft": "TTFT ms",
    "ttft_p95": "p95",
    "time_per_output_token": "ms/token",
    "time_per_output_token_p95": "p95",
    "load_time": "load s",
    "peak_memory": "peak MB",
}


def show(evaluation: dict[str, Any]) -> None:
    """Print tables to stdout: size and quality, drafting for the teacher, speed, tasks."""
    width = None if sys.stdout.isatty() else 160
    console = Console(file=sys.stdout, width=width)
    names = column_names(evaluation)
    metrics = evaluation.get("metrics", ())
    quality = {*ORDER, *metrics, *(f"{metric}{KEPT}" for metric in metrics)}
    quality -= {*DRAFT}
    parts = {"evaluation": [name for name in names if _kind(name) in quality]}
    parts["as a draft for the teacher"] = [name for name in names if _kind(name) in DRAFT]
    for name in names:
        if _kind(name) in SPEED:
            setting = name.partition("/")[2]
            parts.setdefault(f"speed {setting}".rstrip(), []).append(name)
    for heading, columns in parts.items():
        for some in fitting(evaluation, columns, console.width):
            console.print(table(evaluation, heading, some))
    shown = {name for columns in parts.values() for name in columns}
    if tasks := [name for name in names if name not in shown]:
        console.print(task_table(evaluation, tasks))
    for sentence in evaluation.get("notes", ()):
        console.print(_plain(f"note: {sentence}"))
    for sentence in evaluation.get("warnings", ()):
        console.print(_plain(f"warning: {sentence}"))


def fitting(evaluation: dict[str, Any], columns: list[str], width: int) -> list[list[str]]:
    """The columns in as few groups as fit into `width` characters, in their order.

    A table that is too wide would lose its figures: they would be cut to a few letters.
    """
    room = width - max(map(len, evaluation["labels"])) - len("│  │")
    groups: list[list[str]] = [[]]
    left = room
    for name in columns:
        needed = len("  │") + max(map(len, [_heading(name), *_cells(evaluation, name)]))
        if needed > left and groups[-1]:
            groups.append([])
            left = room
        groups[-1].append(name)
        left -= needed
    return [group for group in groups if group]


def _heading(name: str) -> str:
    kind = _kind(name)
    return TITLES[kind] if kind in SPEED else title(name)


def _cells(evaluation: dict[str, Any], name: str) -> list[str]:
    """The figure of each model, or a dash."""
    found = []
    for label in evaluation["labels"]:
        values = {f["name"]: f["value"] for f in evaluation["figures"][label]}
        found.append(cell(name, values[name]) if name in values else "–")
    return found


def table(evaluation: dict[str, Any], heading: str, columns: list[str]) -> Table:
    """A table with a row per model and a column per figure."""
    result = Table(title=heading, title_justify="left")
    result.add_column("model", no_wrap=True)
    for name in columns:
        result.add_column(_heading(name), justify="right", no_wrap=True)
    figures = [_cells(evaluation, name) for name in columns]
    for number, label in enumerate(evaluation["labels"]):
        result.add_row(_plain(label), *(cells[number] for cells in figures))
    return result


def task_table(evaluation: dict[str, Any], names: list[str]) -> Table:
    """A table with a row per score and a column per model.

    Each cell has the score, its standard error, and its share of the teacher's score.
    """
    result = Table(
        title="tasks (± standard error; share of the teacher kept)", title_justify="left"
    )
    result.add_column("score", no_wrap=True)
    for label in evaluation["labels"]:
        result.add_column(_plain(label), justify="right", no_wrap=True)
    figures = {label: {f["name"]: f for f in rows} for label, rows in evaluation["figures"].items()}
    for name in names:
        if not _kind(name).endswith(KEPT):
            cells = [_score(figures[label], name) for label in evaluation["labels"]]
            result.add_row(title(name), *cells)
    return result


def _score(figures: dict[str, dict[str, Any]], name: str) -> str:
    if name not in figures:
        return "–"
    kind, _, task = name.partition("/")
    text = _with_error(name, figures[name])
    kept = figures.get(f"{kind}{KEPT}/{task}")
    return text if kept is None else f"{text}; {_with_error(kept['name'], kept)}"


def _with_error(name: str, figure: dict[str, Any]) -> str:
    error = figure.get("stderr")
    return cell(name, figure["value"]) + (f" ± {cell(name, error)}" if error is not None else "")


def column_names(evaluation: dict[str, Any]) -> list[str]:
    """Names of all figures of an evaluation: those in ORDER first, then SPEED, then the others."""
    names = dict.fromkeys(f["name"] for rows in evaluation["figures"].values() for f in rows)

    def place(name: str) -> int:
        order, kind = ORDER + DRAFT + SPEED, _kind(name)
        return order.index(kind) if kind in order else len(order)

    return sorted(names, key=place)


def title(name: str) -> str:
    """A column's title, for instance `ppl heldout`."""
    kind, _, text = name.partition("/")
    return _plain(f"{TITLES.get(kind, kind)} {text}".strip())


def cell(name: str, value: float) -> str:
    """Format a figure for a table cell."""
    kind = _kind(name)
    if kind == "parameters":
        return f"{value:,.0f}"
    shares = ("agreement", "acceptance", "zeros", "exact_answers")
    if kind in shares or kind.endswith((KEPT, "_of_flops")):
        return f"{value:.1%}"
    if kind.startswith(("acc,", "acc_norm", "exact_match")) or kind == "acc":
        return f"{value:.4f}"
    if kind in ("bytes", "bytes_as_bitmask", "peak_memory"):
        return f"{value / 1e6:,.1f}"
    if kind in ("kl", "bits_per_byte"):
        return f"{value:.4f}"
    if value >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _kind(name: str) -> str:
    return name.partition("/")[0]


def _plain(text: str) -> str:
    """Escape rich markup in a text."""
    return text.replace("[", r"\[")
