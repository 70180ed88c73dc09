"""Plotly figures as dicts in one style, and the Pareto front.

Labels next to points are placed so that they do not overlap and are not cut off.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import product
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
    """A figure in the style of the page; `x` and `y` are axis settings."""
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
    """A line with markers in the style of series `number`."""
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
    """Bars with one colour each."""
    return {
        "type": "bar",
        "x": x,
        "y": y,
        "marker": {"color": colours},
        "showlegend": False,
        "hovertemplate": "%{x}: %{y:.4g}<extra></extra>",
    }


def heat(x: list[Any], y: list[Any], z: Sequence[Sequence[float | None]], **more: Any) -> Trace:
    """A heat map with rows `y` and columns `x`; cells with None stay blank."""
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
    """Escape a text, because plotly interprets some tags and entities as markup."""
    return html.escape(text)


def clip(text: str, limit: int = 26) -> str:
    """Shorten a text to at most `limit` characters, for a label next to a point."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


SIZES = ((275, 195), (430, 240), (850, 250))
"""Width and height of the plot area in pixels: on a phone, at half width, at full width."""
LETTER, LINE_HEIGHT, GAP = 7.0, 15, 9
"""Pixels: width of a letter, height of a line, distance from a point to its label."""

ROUNDS = 4

Point = tuple[float, float]
Box = tuple[float, float, float, float]


def front(points: list[Point]) -> list[Point]:
    """The Pareto front, sorted by x: points that no other point matches or beats in both values."""
    points_on_front: list[Point] = []
    for x, y in sorted(points):
        if not points_on_front or y < points_on_front[-1][1]:
            points_on_front.append((x, y))
    return points_on_front


def places(points: list[Point], names: list[str]) -> list[str]:
    """Choose where each label is placed next to its point, as plotly's `textposition`.

    Points are in shares of the chart's width and height, from the bottom left. In each of several
    rounds, every label moves to the position that overlaps other points and labels least and
    extends beyond the chart least, summed over the chart sizes in SIZES.
    """
    pixels = [[(x * width, (1 - y) * height) for x, y in points] for width, height in SIZES]
    marks = [
        [(x - GAP, y - GAP, x + GAP, y + GAP) for x, y in points_in_pixels]
        for points_in_pixels in pixels
    ]
    chosen: list[str | None] = [None] * len(names)

    def cost(number: int, place: str) -> float:
        total = 0.0
        for size, points_in_pixels, boxes in zip(SIZES, pixels, marks, strict=True):
            others = [
                _box(points_in_pixels[other], names[other], position)
                for other, position in enumerate(chosen)
                if position is not None and other != number
            ]
            total += _cost(
                _box(points_in_pixels[number], names[number], place), boxes + others, size
            )
        return total

    for _ in range(ROUNDS):
        for number in range(len(names)):
            chosen[number] = min(_PLACES, key=lambda place: cost(number, place))
    return [str(place) for place in chosen]


_PLACES = [
    f"{v} {h}"
    for v, h in product(("middle", "top", "bottom"), ("right", "left", "center"))
    if (v, h) != ("middle", "center")
]


def _box(point: Point, name: str, place: str) -> Box:
    (x, y), (v, h) = point, place.split()
    width = LETTER * len(name)
    left = {"right": x + GAP, "left": x - GAP - width, "center": x - width / 2}[h]
    top = {"middle": y - LINE_HEIGHT / 2, "top": y - GAP - LINE_HEIGHT, "bottom": y + GAP}[v]
    return left, top, left + width, top + LINE_HEIGHT


def _cost(box: Box, others: list[Box], size: Point) -> float:
    """Overlap with the boxes in `others`, plus the area outside the chart with a larger weight."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    outside = area - _shared(box, (0, 0, *size))
    return 4 * outside + sum(_shared(box, other) for other in others)


def _shared(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)
