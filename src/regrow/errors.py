"""The one exception type for mistakes the user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, told in one line: the value given, what is allowed, what to do.

    The command line prints it without a traceback and exits with 2.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is none of `known`, naming the closest and those there are."""
    known = list(known)
    hint = nearest(name.lower(), known)
    return UserError(f"no {kind} named {name!r}{hint}; there are: {', '.join(known)}")


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`" — did you mean 'x'?"` for the allowed name closest to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" — did you mean {close[0]!r}?" if close else ""
