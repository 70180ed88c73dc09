"""Cut long text into sections at paragraph ends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")


def sections(chunks: Iterable[str], size: int = 8_000) -> Iterator[str]:
    """Cut the text that `chunks` make together into sections of about `size` characters.

    A section ends at the first blank line after `size` characters, at the latest one after
    `size / 2` where that does not come within `2 * size`, else at a line end, else at a space. The
    white space at a cut is dropped; empty sections are not given.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) >= 2 * size:
            end, begin = _cut(rest, size)
            if rest[:end].strip():
                yield rest[:end].strip("\n")
            rest = rest[begin:]
    while rest.strip():
        end, begin = _cut(rest, size) if len(rest) > size else (len(rest), len(rest))
        yield rest[:end].strip("\n")
        rest = rest[begin:]


def _cut(text: str, size: int) -> tuple[int, int]:
    """Where the first section of `text` ends and where the next one begins."""
    blank = BLANK_LINE.search(text, size, 2 * size)
    if blank is None:
        earlier = list(BLANK_LINE.finditer(text, size // 2, size))
        blank = earlier[-1] if earlier else None
    if blank is not None:
        return blank.start(), blank.end()
    if len(text) < 2 * size:
        return len(text), len(text)
    for mark in ("\n", " "):
        at = text.rfind(mark, size, 2 * size)
        if at >= 0:
            return at, at + 1
    return 2 * size, 2 * size
