"""One file per format; it defines `ENDINGS` (of file names) and `read(path)`, which yields rows."""

from __future__ import annotations

from typing import Any


def without_nulls(value: Any) -> Any:
    """Remove the keys of objects whose value is null, at any depth.

    In a table every row has the keys of all rows, with null for the keys that it lacked originally.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
