"""Reads JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regrow.data.files import open_text
from regrow.errors import UserError

ENDINGS = (".jsonl", ".ndjson")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield one row per non-empty line; raises UserError for a line that is not a JSON object."""
    for _, row in read_with_location(path):
        yield row


def read_with_location(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of `read`, each with its location as `file:line`."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                location = f"{path}:{number}"
                yield location, _row(line, location)


def _row(line: str, location: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{location}: not JSON ({error.msg}); each line must be one object"
        ) from None
    except RecursionError:
        raise UserError(
            f"{location}: lists and objects are nested too deeply: flatten them"
        ) from None
    except ValueError as error:  # such as an integer with thousands of digits
        reason = str(error).partition(";")[0]
        raise UserError(f"{location}: cannot be read ({reason}); leave that value out") from None
    if not isinstance(row, dict):
        raise UserError(
            f"{location}: the line is a JSON {type(row).__name__}; each line must be one object"
        )
    return row
