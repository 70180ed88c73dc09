"""The small steps a stage's folder is made of: space, renames, links, JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from regrow.errors import UserError
from regrow.stage_dir import link, refuse_foreign, replace_folder, require_space, write_json


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def test_foreign_file(out: Path) -> None:
    out.parent.mkdir()
    out.write_text("mine")
    for place in (out, out / "model", out / "a" / "b"):
        with pytest.raises(UserError, match=f"{out} is a file: give --out a folder"):
            refuse_foreign(place)


def test_require_space(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks the disk of the nearest folder there is."""
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(free=3_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_space(out, 3_000_000_000)
    with pytest.raises(UserError) as raised:
        require_space(out, 3_210_000_000)
    assert str(raised.value) == (
        f"no disk space for {out}: 3.21 GB are needed and 3.00 GB free; free some or give --out "
        "another disk"
    )
    assert asked == [out.parent.parent] * 2


def test_replace_folder(tmp_path: Path) -> None:
    new, out = tmp_path / "new", tmp_path / "out"
    for content in ("first", "second"):
        new.mkdir()
        (new / "result").write_text(content)
        replace_folder(new, out)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (out / "result").read_text() == content


def test_write_json_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"ä": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 1}

    def die(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"ä": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 1}


def test_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard link; a copy where the disk has none."""
    (tmp_path / "a").write_text("text")
    link(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").stat().st_ino == (tmp_path / "a").stat().st_ino

    def unable(*_: str) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", unable)
    link(str(tmp_path / "a"), str(tmp_path / "c"))
    assert (tmp_path / "c").read_text() == "text"
    assert (tmp_path / "c").stat().st_ino != (tmp_path / "a").stat().st_ino
