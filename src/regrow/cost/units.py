"""Numbers with their units, for messages."""

from __future__ import annotations

import math

UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "bytes": 1}


def size_text(size: float, up: bool = False) -> str:
    """Bytes with three significant digits, in powers of 1,000; `up` never shows less than `size`.

    A user can give the text of a size that was rounded up as a limit, and the limit is then met.
    """
    whole = math.ceil(size)
    step = 10 ** max(0, len(str(whole)) - 3)
    rounded = step * (-(-whole // step) if up else (whole + step // 2) // step)
    unit = next((unit for unit, of in UNITS.items() if rounded >= of), "bytes")
    return f"{rounded / UNITS[unit]:,.12g} {unit}"
