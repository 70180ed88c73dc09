"""Reads the rows of a source: a file, a folder, a package file, or a dataset on the hub.

A digest of all source files shows, in a later run, whether one of them has changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regrow import plugins, stage_dir
from regrow.config import cache_folder
from regrow.data import packages
from regrow.data.config import SOURCES, DataConfig, SourceConfig
from regrow.data.files import check_sha256, content_of, local_files, plain_name, sha256_of
from regrow.data.prepared_folder import PreparedFolder
from regrow.data.readers import without_nulls
from regrow.errors import UserError

ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?")


def read(source: str) -> Iterator[dict[str, Any]]:
    """Yield rows of `org/name`, `org/name:split` or `org/name@config:split`.

    The default split is train. Raises UserError, in one line, if the hub cannot be reached or does
    not have the dataset.
    """
    parts = ID.fullmatch(source)
    assert parts is not None, source
    import datasets  # slow to import, and only hub sources need it
    from huggingface_hub.errors import HfHubHTTPError

    try:
        rows = datasets.load_dataset(
            parts["name"], parts["config"], split=parts["split"] or "train", streaming=True
        )
        yield from map(without_nulls, rows)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source}: no such local path, and the hub gave no rows ({reason}); check the name "
            "and the network, or use a file"
        ) from error


READERS = "regrow.data.readers"


def rows(source: SourceConfig, cache: Path | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its location ("file, row 3"), in a fixed order; reads files lazily."""
    if _is_hub(source):
        if source.sha256 is not None or source.reader is not None:
            raise UserError(
                f"{source.source}: sha256 and reader apply to files only, not to a hub id"
            )
        for number, row in enumerate(read(source.source), start=1):
            yield f"{source.source}, row {number}", row
        return
    for path in resolve(source, cache):
        reader = plugins.load(READERS, source.reader or reader_of(path))
        for number, row in enumerate(reader.read(path), start=1):
            yield f"{path}, row {number}", row


def at_hand(data: DataConfig) -> bool:
    """Whether every source is a local file or folder, so that nothing has to be downloaded."""
    return all(Path(source.source).expanduser().exists() for source in data.sources)


def resolve(source: SourceConfig, cache: Path | None = None) -> list[Path]:
    """The local files of a file, folder or `package:` source; their sha256 is checked.

    `cache` is the folder for files from packages; None means REGROW_CACHE or ~/.cache/regrow.
    Raises UserError for a source that does not exist, has no reader, or has another sha256.
    """
    if source.source.startswith(packages.PREFIX):
        kept = cache if cache is not None else cache_folder()
        return [packages.fetch(source.source, source.sha256, kept)]
    path = Path(source.source).expanduser()
    if PreparedFolder.of(source) is not None or (path / SOURCES).is_file():
        raise UserError(
            f"{path}: this folder has prepared tokens, not text, which is needed here: give the "
            "text that it was prepared from"
        )
    if path.is_dir():
        if source.sha256 is not None:
            raise UserError(f"{path}: sha256 is for a single file, this is a folder; leave it out")
        return _readable_files(path, source.reader)
    if not path.exists():
        raise UserError(f"{source.source}: no such file or folder; check the path")
    if source.reader is None:
        reader_of(path)
    if source.sha256 is not None:
        check_sha256(sha256_of(path), source.sha256, source.source)
    return [path]


def check_source(source: SourceConfig) -> None:
    """Raise UserError for a local source that is missing, has no reader, or has changed since it
    was prepared."""
    if (prepared := PreparedFolder.of(source)) is not None:
        prepared.check_source()
        return
    if not source.source.startswith(packages.PREFIX) and not _is_hub(source):
        resolve(source)


def reader_of(path: Path) -> str:
    """The reader whose endings match the file's name; raises UserError if there is none."""
    for reader, endings in _endings().items():
        if plain_name(path).endswith(endings):
            return reader
    allowed = " ".join(ending for endings in _endings().values() for ending in endings)
    raise UserError(
        f"{path}: no reader for this ending; known: {allowed} (each also .gz), or set `reader`"
    )


def _endings() -> dict[str, tuple[str, ...]]:
    return {name: plugins.load(READERS, name).ENDINGS for name in plugins.names(READERS)}


def _readable_files(folder: Path, reader: str | None) -> list[Path]:
    """All readable files below the folder, sorted; names that begin with a dot are skipped."""
    by_reader = _endings()
    endings = (
        by_reader[reader]
        if reader
        else tuple(e for reader_endings in by_reader.values() for e in reader_endings)
    )
    paths = [path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder)]
    readable = sorted(path for path in paths if plain_name(path).endswith(endings))
    if not readable:
        raise UserError(f"{folder}: it has no file with one of the endings {' '.join(endings)}")
    return readable


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_hub(source: SourceConfig) -> bool:
    """Whether a source is a hub id: no such path exists, and no reader has the name's ending."""
    name = source.source
    if ID.fullmatch(name) is None or Path(name).exists():
        return False
    endings = tuple(
        e for reader_endings in _endings().values() for e in reader_endings if e.startswith(".")
    )
    return not plain_name(Path(name)).endswith(endings)


def data_digest(data: DataConfig) -> str:
    """The SHA-256 of the config and, for local sources, of each file's name and content.

    The modification time is not included: text that was copied or downloaded again is the same.
    """
    contents = []
    for source in data.sources:
        if (prepared := PreparedFolder.of(source)) is not None:
            contents.append(["prepared", prepared.digest])
            continue
        for file in local_files(source.source):
            stat = file.stat()
            contents.append([file.name, content_of(file, stat.st_size, stat.st_mtime_ns)])
    return stage_dir.digest(data.model_dump(mode="json"), contents)


def outline(source: SourceConfig) -> str:
    """The SHA-256 of the names and sizes of a local source's files, whose content is not read."""
    if (prepared := PreparedFolder.of(source)) is not None:
        return stage_dir.digest(source.source, prepared.digest)
    files = [[file.name, file.stat().st_size] for file in local_files(source.source)]
    return stage_dir.digest(source.source, files)
