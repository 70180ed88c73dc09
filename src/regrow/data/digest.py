"""A digest of the text a job reads, so that a changed file is noticed when the job is run again."""

from __future__ import annotations

from pathlib import Path

from regrow import manifest
from regrow.data.config import DataConfig


def data_digest(data: DataConfig) -> str:
    """SHA-256 over the config and, for local sources, each file's name, size and time of change."""
    found = []
    for source in data.sources:
        path = Path(source.source).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                stat = file.stat()
                found.append([str(file), stat.st_size, stat.st_mtime_ns])
    return manifest.digest(data.model_dump(mode="json"), found)
