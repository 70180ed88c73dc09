"""The table of an evaluation on the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

ORDER = (
    "parameters",
    "bytes",
    "perplexity",
    "perplexity_per_reference_token",
    "bits_per_byte",
    "kl",
    "prefill",
    "decode",
)
TITLES = {
    "perplexity": "ppl",
    "perplexity_per_reference_token": "ppl/ref token",
    "bits_per_byte": "bits/byte",
    "kl": "KL",
    "bytes": "MB",
    "prefill": "prefill tok/s",
    "decode": "decode tok/s",
}


def show(evaluation: dict[str, Any]) -> None:
    """Print one row per model and one column per figure to stdout."""
    width = None if sys.stdout.isatty() else 160
    Console(file=sys.stdout, width=width).print(table(evaluation))


def table(evaluation: dict[str, Any]) -> Table:
    """Rows are models, columns figures: those of ORDER first."""
    columns = column_names(evaluation)
    found = Table(title="evaluation", title_justify="left")
    found.add_column("model", no_wrap=True)
    for name in columns:
        found.add_column(title(name), justify="right", no_wrap=True)
    for label in evaluation["labels"]:
        values = {f["name"]: f["value"] for f in evaluation["figures"][label]}
        cells = [cell(name, values[name]) if name in values else "–" for name in columns]
        found.add_row(_plain(label), *cells)
    return found


def column_names(evaluation: dict[str, Any]) -> list[str]:
    """Names of all figures of an evaluation, those of ORDER first."""
    names = dict.fromkeys(f["name"] for some in evaluation["figures"].values() for f in some)

    def place(name: str) -> int:
        kind = name.partition("/")[0]
        return ORDER.index(kind) if kind in ORDER else len(ORDER)

    return sorted(names, key=place)


def title(name: str) -> str:
    """A column's title, for instance `ppl heldout`."""
    kind, _, text = name.partition("/")
    return _plain(f"{TITLES.get(kind, kind)} {text}".strip())


def cell(name: str, value: float) -> str:
    """A figure as shown in a table."""
    kind = name.partition("/")[0]
    if kind == "parameters":
        return f"{value:,.0f}"
    if kind == "bytes":
        return f"{value / 1e6:,.1f}"
    if kind in ("kl", "bits_per_byte"):
        return f"{value:.4f}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _plain(text: str) -> str:
    """Text in which rich finds no markup."""
    return text.replace("[", r"\[")
