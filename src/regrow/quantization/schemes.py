"""Named schemes: how many bits a weight gets, which weights share a scale, what misfits fall to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from regrow.errors import UserError, nearest


@dataclass(frozen=True)
class Scheme:
    """How the weights of a linear layer are stored."""

    name: str
    bits: int
    kind: Literal["int", "float"] = "int"
    group: int | None = None
    """Columns of a row that share a scale; None: the whole row."""
    symmetric: bool = True
    """Whether zero is in the middle of the grid; otherwise each group has a zero point."""
    dynamic: bool = False
    """Whether the layer's inputs are quantized too, each token with a scale of its own."""
    fallback: str = ""
    """Scheme of a layer whose columns are no multiple of `group`."""

    def groups(self, columns: int) -> int:
        """Scales of a row; its columns must be whole groups."""
        assert self.group is None or columns % self.group == 0, (columns, self.group)
        return 1 if self.group is None else columns // self.group

    def stored_bits(self, rows: int, columns: int) -> int:
        """Bits of a weight [rows, columns] with its 16-bit scales and its zero points."""
        zeros = 0 if self.symmetric else self.bits
        return rows * (columns * self.bits + self.groups(columns) * (16 + zeros))


def _int4(group: int, fallback: str) -> list[Scheme]:
    """Without and with zero points; so is what they fall to."""
    name, smaller = f"int4-g{group}", fallback.startswith("int4")
    return [
        Scheme(name, 4, group=group, fallback=fallback),
        Scheme(
            name + ASYMMETRIC,
            4,
            group=group,
            symmetric=False,
            fallback=fallback + ASYMMETRIC if smaller else fallback,
        ),
    ]


ASYMMETRIC = "-asym"
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 8),
        Scheme("int8-dynamic", 8, dynamic=True),
        Scheme("fp8", 8, "float", dynamic=True),
        *_int4(32, "int8"),
        *_int4(64, "int4-g32"),
        *_int4(128, "int4-g64"),
    )
}
SHORT = {"int4": "int4-g64"}
"""Short names."""


def find(name: str) -> Scheme:
    """The scheme of that name; raises UserError when there is none."""
    full = SHORT.get(name, name)
    if full not in SCHEMES:
        known = [*SHORT, *SCHEMES]
        raise UserError(f"no scheme named {name!r}{nearest(name, known)}; there are: {known}")
    return SCHEMES[full]


def fitting(scheme: Scheme, columns: int) -> Scheme:
    """The scheme that rows of `columns` weights get when `scheme` is asked for."""
    while scheme.group is not None and columns % scheme.group:
        scheme = SCHEMES[scheme.fallback]
    return scheme
