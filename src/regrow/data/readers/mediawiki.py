"""Reads MediaWiki XML dumps, such as enwik8, as prose."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from regrow.data.files import open_text
from regrow.data.wikitext import to_prose
from regrow.errors import UserError

ENDINGS = (".xml", "enwik8", "enwik9")
MIN_CHARACTERS = 300
"""The minimum length of an article; shorter ones are mostly a definition and a list of links."""

TITLE = re.compile(r"<title>(.*?)</title>")
NAMESPACE = re.compile(r"<namespace key=[^>]*>([^<]+)</namespace>")
TEXT = re.compile(r"<text\b[^>]*>")
REDIRECT = re.compile(r"\s*#redirect", re.IGNORECASE)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield rows {title, text}: articles with at least 300 characters of prose, in file order.

    Redirects, pages outside the article namespace and an incomplete last page are skipped. Raises
    UserError if there is no page at all.
    """
    pages = 0
    with open_text(path, errors="replace") as file:  # an incomplete dump may end within a character
        for title, markup in _pages(file):
            pages += 1
            text = to_prose(markup)
            if len(text) >= MIN_CHARACTERS:
                yield {"title": title, "text": text}
    if pages == 0:
        raise UserError(f"{path}: no <page> with text in it; is it a MediaWiki XML dump?")


def _pages(file: TextIO) -> Iterator[tuple[str, str]]:
    """Yield title and markup of each article, line by line: enwik8 is not well-formed XML."""
    namespaces = {"Media", "Special", "Talk", "User", "Wikipedia", "Image", "File", "MediaWiki"}
    namespaces |= {"Template", "Help", "Category", "Portal"}
    title = ""
    for line in file:
        if (match := TITLE.search(line)) is not None:
            title = html.unescape(match.group(1))
        if (match := NAMESPACE.search(line)) is not None:
            namespaces.add(html.unescape(match.group(1)))
        if (match := TEXT.search(line)) is not None and not match.group().endswith("/>"):
            body = _body(line[match.end() :], file)
            other_namespace = ":" in title and title.partition(":")[0] in namespaces
            if body is not None and not other_namespace and not REDIRECT.match(body):
                yield title, html.unescape(body)


def _body(first: str, file: TextIO) -> str | None:
    """The page's text up to its closing tag; None if the file ends before the tag."""
    lines = [first]
    while "</text>" not in lines[-1]:
        line = file.readline()
        if not line:
            return None
        lines.append(line)
    return "".join(lines).partition("</text>")[0]
