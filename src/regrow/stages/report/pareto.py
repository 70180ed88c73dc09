"""The Pareto front, and names beside points that neither hide each other nor are cut off."""

from __future__ import annotations

from itertools import product

SIZES = ((275, 195), (430, 240), (850, 250))
"""Pixels of a chart's inside: on a phone, as one of two in a line, and as the only one."""
LETTER, LINE, GAP = 7.0, 15, 9
"""Pixels of a letter, of a line, and from a point to its name."""

ROUNDS = 4

Point = tuple[float, float]
Box = tuple[float, float, float, float]


def front(points: list[Point]) -> list[Point]:
    """The points of which no other is at most as large in both, by x: the Pareto front."""
    found: list[Point] = []
    for x, y in sorted(points):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def places(points: list[Point], names: list[str]) -> list[str]:
    """Where each name goes beside its point, in plotly's words: `top center`, `middle right`, …

    Points are in shares of the chart's width and height, from bottom left. In some rounds each
    takes the place that covers least of points and other names, and hangs out least, summed over
    the sizes that a chart may have.
    """
    pixels = [[(x * width, (1 - y) * height) for x, y in points] for width, height in SIZES]
    marks = [[(x - GAP, y - GAP, x + GAP, y + GAP) for x, y in some] for some in pixels]
    found: list[str | None] = [None] * len(names)

    def cost(number: int, place: str) -> float:
        total = 0.0
        for size, some, taken in zip(SIZES, pixels, marks, strict=True):
            others = [
                _box(some[other], names[other], where)
                for other, where in enumerate(found)
                if where is not None and other != number
            ]
            total += _cost(_box(some[number], names[number], place), taken + others, size)
        return total

    for _ in range(ROUNDS):
        for number in range(len(names)):
            found[number] = min(_PLACES, key=lambda place: cost(number, place))
    return [str(place) for place in found]


_PLACES = [
    f"{v} {h}"
    for v, h in product(("middle", "top", "bottom"), ("right", "left", "center"))
    if (v, h) != ("middle", "center")
]


def _box(point: Point, name: str, place: str) -> Box:
    (x, y), (v, h) = point, place.split()
    width = LETTER * len(name)
    left = {"right": x + GAP, "left": x - GAP - width, "center": x - width / 2}[h]
    top = {"middle": y - LINE / 2, "top": y - GAP - LINE, "bottom": y + GAP}[v]
    return left, top, left + width, top + LINE


def _cost(box: Box, taken: list[Box], size: Point) -> float:
    """Area that is covered already, and area outside the chart, which is worse."""
    whole = (box[2] - box[0]) * (box[3] - box[1])
    outside = whole - _shared(box, (0, 0, *size))
    return 4 * outside + sum(_shared(box, other) for other in taken)


def _shared(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)
