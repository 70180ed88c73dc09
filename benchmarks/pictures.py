"""Line and bar charts as small SVG files, for the pages in docs/."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

COLOURS = ("#1f5fa8", "#c47f17", "#8a95a3", "#7f9c3a", "#8c4a6b")
WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 196, 34, 46
"""Margins in pixels; the names of the lines stand in the right one."""
Scale = Callable[[float], float]
"""From a value to its place in pixels."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: its points, the spread of each (± in units of y), and its look."""

    name: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] = ()
    colour: int = 0
    dashed: bool = False


def line_chart(
    title: str, x_label: str, lines: Sequence[Line], log: bool = False, limit: float = math.inf
) -> str:
    """An SVG with one x tick per value of x; y is linear or logarithmic, and cut off at `limit`."""
    lines = [line for line in lines if line.points]
    xs = sorted({x for line in lines for x, _ in line.points})
    low, high, ticks = _range(lines, log, limit)

    def across(x: float) -> float:
        share = (x - xs[0]) / ((xs[-1] - xs[0]) or 1)
        return LEFT + 12 + share * (WIDTH - LEFT - RIGHT - 24)

    def down(y: float) -> float:
        y = min(max(y, low), high)
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(10, 18, title),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle"),
    ]
    for y in ticks:
        parts += [_stroke([(LEFT, down(y)), (WIDTH - RIGHT, down(y))], "#e3e7ec", 1)]
        parts += [_text(LEFT - 6, down(y) + 4, f"{y:,.5g}", "end")]
    parts += [_text(across(x), HEIGHT - BOTTOM + 18, f"{x:g}", "middle") for x in xs]
    for number, line in enumerate(lines):
        parts += _drawn(line, number, across, down)
    return "\n".join([*parts, "</svg>"]) + "\n"


def bar_chart(title: str, groups: Sequence[str], series: dict[str, Sequence[float]]) -> str:
    """An SVG of horizontal bars: in each group one bar of each series, with its value beside it."""
    row, left = 16, max(120, 16 + 7 * max(map(len, groups)))
    height = TOP + len(groups) * (row * len(series) + 12) + 8
    longest = max(value for values in series.values() for value in values)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(10, 18, title),
    ]
    for number, group in enumerate(groups):
        top = TOP + number * (row * len(series) + 12)
        parts.append(_text(left - 8, top + row * len(series) / 2 + 4, group, "end"))
        for place, values in enumerate(series.values()):
            y, width = top + place * row, (WIDTH - RIGHT - left - 40) * values[number] / longest
            parts.append(
                f'<rect x="{left}" y="{y + 2}" width="{width:.1f}" height="{row - 4}" '
                f'fill="{COLOURS[place]}"/>'
            )
            parts.append(_text(left + width + 5, y + 12, f"{values[number]:.3g}"))
    for place, name in enumerate(series if len(series) > 1 else ()):
        y = TOP + 10 + 18 * place
        start = WIDTH - RIGHT + 14
        parts.append(
            f'<rect x="{start}" y="{y - 6}" width="22" height="12" fill="{COLOURS[place]}"/>'
        )
        parts.append(_text(start + 28, y + 4, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _drawn(line: Line, number: int, across: Scale, down: Scale) -> list[str]:
    """The line, its points, their spreads, and its row of the legend."""
    colour = COLOURS[line.colour % len(COLOURS)]
    places = [(across(x), down(y)) for x, y in line.points]
    parts = [_stroke(places, colour, 2, line.dashed)]
    for (x, y), spread in zip(line.points, line.spread, strict=False):
        ends = [(across(x), down(y - spread)), (across(x), down(y + spread))]
        parts.append(_stroke(ends, colour, 1))
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
    legend = TOP + 10 + 18 * number
    start = WIDTH - RIGHT + 14
    parts.append(_stroke([(start, legend), (start + 22, legend)], colour, 2, line.dashed))
    return [*parts, _text(start + 28, legend + 4, line.name)]


def _range(lines: Sequence[Line], log: bool, limit: float) -> tuple[float, float, list[float]]:
    """The lowest and the highest y of the chart, and the ticks between them."""
    ends = [
        y + sign * spread
        for line in lines
        for (_, y), spread in zip(
            line.points, [*line.spread, *[0.0] * len(line.points)], strict=False
        )
        for sign in (-1, 1)
    ]
    low, high = min(ends), min(limit, max(ends))
    if log:
        steps = [base * 10.0**power for power in range(-3, 9) for base in (1, 2, 5)]
        below = max(step for step in steps if step <= low)
        above = min(step for step in steps if step >= high)
        ticks = [step for step in steps if below <= step <= above]
        if len(ticks) > 7:
            ticks = [tick for tick in ticks if f"{tick:e}".startswith("1.")]
        return below, above, ticks
    step = 10.0 ** math.floor(math.log10((high - low) or abs(high) or 1))
    step /= next(n for n in (1, 2, 5, 10) if (high - low) / (step / n) >= 4 or n == 10)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return first * step, last * step, [number * step for number in range(first, last + 1)]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _stroke(
    points: Sequence[tuple[float, float]], colour: str, width: int, dashed: bool = False
) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>'
    )
