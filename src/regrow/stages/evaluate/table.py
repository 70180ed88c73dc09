"""The tables of an evaluation on the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

ORDER = (
    "parameters",
    "bytes",
    "bits_per_weight",
    "perplexity",
    "perplexity_per_reference_token",
    "bits_per_byte",
    "kl",
)
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
"""Ending of the kind of a figure that is a share of the teacher's."""
TITLES = {
    "perplexity": "ppl",
    "perplexity_per_reference_token": "ppl/ref token",
    "bits_per_byte": "bits/byte",
    "kl": "KL",
    "bytes": "MB",
    "bits_per_weight": "bits/weight",
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
    """Print tables to stdout: size and quality, speed, tasks."""
    width = None if sys.stdout.isatty() else 160
    console = Console(file=sys.stdout, width=width)
    names = column_names(evaluation)
    parts = {"evaluation": [name for name in names if _kind(name) in ORDER]}
    for name in names:
        if _kind(name) in SPEED:
            setting = name.partition("/")[2]
            parts.setdefault(f"speed {setting}".rstrip(), []).append(name)
    for heading, some in parts.items():
        if some:
            console.print(table(evaluation, heading, some))
    known = {name for some in parts.values() for name in some}
    if tasks := [name for name in names if name not in known]:
        console.print(task_table(evaluation, tasks))


def table(evaluation: dict[str, Any], heading: str, columns: list[str]) -> Table:
    """Rows are models, columns figures."""
    found = Table(title=heading, title_justify="left")
    found.add_column("model", no_wrap=True)
    for name in columns:
        kind, _, _ = name.partition("/")
        heading = TITLES[kind] if kind in SPEED else title(name)
        found.add_column(heading, justify="right", no_wrap=True)
    for label in evaluation["labels"]:
        values = {f["name"]: f["value"] for f in evaluation["figures"][label]}
        cells = [cell(name, values[name]) if name in values else "–" for name in columns]
        found.add_row(_plain(label), *cells)
    return found


def task_table(evaluation: dict[str, Any], names: list[str]) -> Table:
    """Rows are scores of tasks, columns models: the score, its standard error, the share kept."""
    found = Table(title="tasks (± standard error; share of the teacher kept)", title_justify="left")
    found.add_column("score", no_wrap=True)
    for label in evaluation["labels"]:
        found.add_column(_plain(label), justify="right", no_wrap=True)
    figures = {label: {f["name"]: f for f in some} for label, some in evaluation["figures"].items()}
    for name in names:
        if not _kind(name).endswith(KEPT):
            cells = [_score(figures[label], name) for label in evaluation["labels"]]
            found.add_row(title(name), *cells)
    return found


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
    """Names of all figures of an evaluation, those of ORDER first, then those of SPEED."""
    names = dict.fromkeys(f["name"] for some in evaluation["figures"].values() for f in some)

    def place(name: str) -> int:
        every, kind = ORDER + SPEED, _kind(name)
        return every.index(kind) if kind in every else len(every)

    return sorted(names, key=place)


def title(name: str) -> str:
    """A column's title, for instance `ppl heldout`."""
    kind, _, text = name.partition("/")
    return _plain(f"{TITLES.get(kind, kind)} {text}".strip())


def cell(name: str, value: float) -> str:
    """A figure as shown in a table."""
    kind = _kind(name)
    if kind == "parameters":
        return f"{value:,.0f}"
    if kind.endswith((KEPT, "_of_flops")):
        return f"{value:.1%}"
    if kind.startswith(("acc", "exact_match")):
        return f"{value:.4f}"
    if kind in ("bytes", "peak_memory"):
        return f"{value / 1e6:,.1f}"
    if kind in ("kl", "bits_per_byte"):
        return f"{value:.4f}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _kind(name: str) -> str:
    return name.partition("/")[0]


def _plain(text: str) -> str:
    """Text in which rich finds no markup."""
    return text.replace("[", r"\[")
