"""Opens the files of a source: UTF-8 text or bytes, through gzip when the name ends in .gz."""

from __future__ import annotations

import gzip
import hashlib
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from shutil import copyfileobj
from typing import IO, TextIO, cast

from regrow.errors import UserError
from regrow.runtime.progress import Progress


@contextmanager
def open_text(path: Path, errors: str = "strict") -> Iterator[TextIO]:
    """Open `path` as UTF-8 text with \\n newlines; raises UserError if UTF-8 or gzip is invalid."""
    with _readable(path):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", errors=errors) as file:
            yield cast(TextIO, file)


@contextmanager
def open_seekable(path: Path) -> Iterator[IO[bytes]]:
    """Open `path` as seekable bytes; a .gz file is first unpacked into a temporary file."""
    with _readable(path):
        if path.suffix != ".gz":
            with path.open("rb") as plain:
                yield plain
            return
        # Seeking back in a gzip stream decompresses it from the start, and formats with a footer
        # seek back often.
        with gzip.open(path) as packed, tempfile.TemporaryFile() as unpacked:
            copyfileobj(packed, unpacked)
            unpacked.seek(0)
            yield unpacked


def local_files(source: str) -> list[Path]:
    """The files of a local file or folder, sorted; none for other sources."""
    path = Path(source).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.is_file()]


@lru_cache(maxsize=4096)
def content_of(path: Path, size: int, changed: int) -> str:
    """The SHA-256 of a file, computed once per process unless the file changes."""
    return sha256_of(path)


def plain_name(path: Path) -> str:
    """The file's name in lower case, without .gz, to compare with a reader's ENDINGS."""
    return path.name.lower().removesuffix(".gz")


def sha256_of(path: Path) -> str:
    """The SHA-256 of the file's bytes, as hex."""
    digest = hashlib.sha256()
    counter = Progress(f"hashing {path.name}", path.stat().st_size >> 20, "MiB")
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            counter.advance((file.tell() >> 20) - counter.done)
    return digest.hexdigest()


def check_sha256(digest: str, expected: str | None, name: str) -> None:
    """Raise UserError if `digest` is not the `expected` one; None accepts any digest."""
    if expected is not None and digest != expected.lower():
        raise UserError(
            f"{name}: its SHA-256 is {digest}, not {expected.lower()}; use the right file, or "
            "correct sha256"
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken gzip file ({error}); fetch it again") from error
