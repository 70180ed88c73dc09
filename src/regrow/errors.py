"""The exception for mistakes that the user can correct."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, in one line: the value, the allowed values, and the remedy.

    The command line prints it without a traceback and exits with 2.
    """


def last_line(error: Exception) -> str:
    """The last line of an error's text, or the name of its class if it has no text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()


FOREIGN = re.compile(r"[/\\](transformers|huggingface_hub)[/\\]")
"""Files of model and config classes, in a traceback."""
MOST_CHARACTERS = 200


def reason_of(error: Exception) -> str:
    """The class and the last line of an error that a model class raised, as a reason.

    An error that did not pass through the code of transformers is one of ours: it is raised again.
    """
    line, name = last_line(error), type(error).__name__
    if isinstance(error, UserError):
        return line[:MOST_CHARACTERS]
    frames = traceback.extract_tb(error.__traceback__)
    if not any(FOREIGN.search(frame.filename) for frame in frames):
        raise error
    return (line if line.startswith(name) else f"{name} {line}")[:MOST_CHARACTERS]


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
