"""A digest of the text a job reads, so that a changed file is noticed when the job is run again."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from regrow import manifest
from regrow.data.config import DataConfig
from regrow.data.files import sha256_of


def data_digest(data: DataConfig) -> str:
    """SHA-256 over the config and, for local sources, each file's name and content.

    Not over its time of change: text that was copied or fetched again is the same text.
    """
    found = []
    for source in data.sources:
        path = Path(source.source).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                stat = file.stat()
                found.append([file.name, _content(file, stat.st_size, stat.st_mtime_ns)])
    return manifest.digest(data.model_dump(mode="json"), found)


@lru_cache(maxsize=4096)
def _content(path: Path, size: int, changed: int) -> str:
    """Read once a process, unless the file was changed meanwhile."""
    return sha256_of(path)
