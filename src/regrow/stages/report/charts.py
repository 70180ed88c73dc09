"""Plotly figures as plain dicts, in one look: one accent, greys, no more ink than needed."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

INK, SOFT, LINE, ACCENT = "#1c2430", "#5b6675", "#e3e7ec", "#0f6e84"
FAINT = "#ccd3da"
SHADES = (ACCENT, "#8a95a3", "#c47f17", "#54606e", "#6fb1bf", "#8c4a6b", "#7f9c3a", "#b9a089")
SCALE = [[0.0, "#f3f6f8"], [0.35, "#b5d4dc"], [0.7, "#4a98aa"], [1.0, "#0b4f60"]]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

Trace = dict[str, Any]


def figure(
    data: list[Trace], x: dict[str, Any], y: dict[str, Any], **layout: Any
) -> dict[str, Any]:
    """A figure with the page's look; `x` and `y` are axis settings."""
    axis = {"gridcolor": LINE, "linecolor": LINE, "zeroline": False, "automargin": True}
    named = sum(1 for trace in data if trace.get("showlegend", True) and "name" in trace)
    return {
        "data": data,
        "layout": {
            "font": {"family": FONT, "size": 13, "color": INK},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
            "showlegend": named > 1,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "hoverlabel": {"font": {"family": FONT}},
            "xaxis": {**axis, **x},
            "yaxis": {**axis, **y},
            **layout,
        },
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {
        "title": {"text": label(title), "font": {"size": 12, "color": SOFT}, "standoff": 10},
        **more,
    }


def line(
    name: str, x: list[Any], y: list[float], number: int = 0, errors: list[float] | None = None
) -> Trace:
    """A line with markers in the look of series `number`."""
    colour = SHADES[number % len(SHADES)]
    trace: Trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label(name),
        "x": x,
        "y": y,
        "line": {"color": colour, "width": 2.5},
        "marker": {"size": 8, "color": colour},
    }
    if errors is not None:
        trace["error_y"] = {"type": "data", "array": errors, "thickness": 1, "width": 3}
    return trace


def bars(x: list[Any], y: list[float], colours: list[str]) -> Trace:
    """Bars, each in its own colour."""
    return {
        "type": "bar",
        "x": x,
        "y": y,
        "marker": {"color": colours},
        "showlegend": False,
        "hovertemplate": "%{x}: %{y:.4g}<extra></extra>",
    }


def heat(x: list[Any], y: list[Any], z: Sequence[Sequence[float | None]], **more: Any) -> Trace:
    """A heat map, rows `y` by columns `x`; None stays blank."""
    return {
        "type": "heatmap",
        "x": x,
        "y": y,
        "z": z,
        "colorscale": SCALE,
        "hoverongaps": False,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "len": 1.0, "y": 0.5},
        "xgap": 0,
        "ygap": 1,
        **more,
    }


def label(text: str) -> str:
    """Text as plotly shows it letter by letter: it takes some tags and entities for markup."""
    return html.escape(text)


def clip(text: str, most: int = 26) -> str:
    """At most so many letters of a text, for a name beside a point."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
