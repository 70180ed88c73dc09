"""Plain text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regrow.data.files import open_text
from regrow.data.wikitext import sections

ENDINGS = (".txt",)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Rows {text}: sections of about 8,000 characters, cut at blank lines.

    Splits are made of whole documents. Were the file one document, a single .txt (the commonest
    source there is) would fall into one split and leave the others empty.
    """
    with open_text(path) as file:
        for section in sections(iter(lambda: file.read(1 << 16), "")):
            yield {"text": section}
