"""Reads Parquet tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regrow.data.files import open_seekable
from regrow.data.readers import without_nulls
from regrow.errors import UserError

ENDINGS = (".parquet",)
BATCH_ROWS = 1_024


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows in order, without null values; raises UserError if this is no Parquet file."""
    import pyarrow  # here, because it is slow and all readers are imported to compare endings
    from pyarrow import parquet

    with open_seekable(path) as file:
        try:
            table = parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: not a Parquet file ({reason}); fetch it again") from None
        for batch in table.iter_batches(batch_size=BATCH_ROWS):
            yield from map(without_nulls, batch.to_pylist())
