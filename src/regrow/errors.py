"""The exception for mistakes that the user can correct."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, in one line: the value, the allowed values, and the remedy.

    The command line prints it without a traceback and exits with 2.
    """


def last_line(error: Exception) -> str:
    """The last line of an error's text, or the name of its class if it has no text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in `known`; it lists those and suggests the closest."""
    known = list(known)
    hint = nearest(name, known)
    return UserError(f"no {kind} named {name!r}{hint}; there are: {', '.join(known)}")


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`" — did you mean 'x'?"` for the closest allowed name, in any case; else an empty string."""
    by_lower = {each.lower(): each for each in allowed}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f" — did you mean {by_lower[close[0]]!r}?" if close else ""
