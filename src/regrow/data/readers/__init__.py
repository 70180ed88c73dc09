"""One file per format, with the `ENDINGS` of file names and `read(path)`, an iterator of rows."""

from __future__ import annotations

from typing import Any


def without_nulls(value: Any) -> Any:
    """The value without the keys of objects that are null, at any depth.

    Tables give every row the keys of all rows, with null for those that it never had.
    """
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
