"""Reads plain text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regrow.data.files import open_text
from regrow.data.wikitext import sections

ENDINGS = (".txt",)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield rows {text}: sections of about 8,000 characters, cut at blank lines.

    Splits consist of whole documents. If the file were one document, a single .txt (the most common
    source) would be in one split, and the other splits would be empty.
    """
    with open_text(path) as file:
        for section in sections(iter(lambda: file.read(1 << 16), "")):
            yield {"text": section}
