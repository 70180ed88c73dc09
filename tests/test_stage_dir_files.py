"""Helper functions of a stage's folder: disk space, renames, links, JSON."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import pytest

from regrow.config import Config
from regrow.errors import UserError
from regrow.stage_dir import (
    StageDir,
    link,
    output_file,
    output_folder,
    refuse_foreign,
    replace_folder,
    require_space,
    write_json,
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def test_a_file_as_output_folder_is_refused(out: Path) -> None:
    out.parent.mkdir()
    out.write_text("mine")
    for place in (out, out / "model", out / "a" / "b"):
        with pytest.raises(UserError, match=f"{out} is a file: give --out a folder"):
            refuse_foreign(place)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # as /dev/null
    except PermissionError:
        pytest.skip("only root makes devices")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, chdir(path.parent):
        server.bind(path.name)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a device": make_device,
    "a socket": make_socket,
    "a link to a place that does not exist": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_devices_and_pipes_are_refused(kind: str, tmp_path: Path) -> None:
    """Refused at once, and still there: it is not opened, and nothing is put in its place."""
    out = tmp_path / "out"
    SPECIAL[kind](out)
    before = out.lstat()
    for place in (out, out / "model"):
        with pytest.raises(UserError, match=f"{out} is {kind}: give --out a folder"):
            refuse_foreign(place)
        with pytest.raises(UserError, match=f"{out} is {kind}: give --out a folder"):
            StageDir(place, "prune", Config(), {})
    with pytest.raises(UserError, match=f"{out} is {kind}: give --out the name of a file"):
        output_file(out)
    after = out.lstat()
    assert (after.st_ino, after.st_mode, after.st_ctime_ns) == (
        *(before.st_ino, before.st_mode),
        before.st_ctime_ns,
    )
    assert list(tmp_path.iterdir()) == [out]


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    """The result is on the disk that the link leads to, and the link is still one."""
    (tmp_path / "disk" / "real").mkdir(parents=True)
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "disk" / "real")
    for content in ("first", "second"):
        with StageDir(out, "prune", Config(), {"input": content}) as folder:
            assert folder.parent == tmp_path / "disk"
            (folder / "result").write_text(content)
        assert out.is_symlink()
        assert (tmp_path / "disk" / "real" / "result").read_text() == content
        assert StageDir(out, "prune", Config(), {"input": content}).complete
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        *("disk", "manifest.json", "out", "real", "result")
    ]


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out").symlink_to("file")
    assert output_file(tmp_path / "out") == tmp_path / "file"
    assert output_file(tmp_path / "new") == tmp_path / "new"
    with pytest.raises(UserError, match="is a folder: give --out the name of a file"):
        output_file(tmp_path)


@pytest.mark.parametrize("out", [".", "here/..", "/"])
def test_a_folder_that_cannot_be_renamed(out: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with chdir(tmp_path), pytest.raises(UserError, match="is a mount point or the current folder"):
        output_folder(Path(out))


def test_too_little_space_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks the disk of the nearest folder there is."""
    folders: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        folders.append(Path(path))
        return SimpleNamespace(free=3_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_space(out, 3_000_000_000)
    with pytest.raises(UserError) as raised:
        require_space(out, 3_210_000_000)
    assert str(raised.value) == (
        f"no disk space for {out}: 3.21 GB are needed and 3.00 GB free; free some or give --out "
        "another disk"
    )
    assert folders == [out.parent.parent] * 2


def test_replace_folder_swaps_by_rename(tmp_path: Path) -> None:
    new, out = tmp_path / "new", tmp_path / "out"
    for content in ("first", "second"):
        new.mkdir()
        (new / "result").write_text(content)
        replace_folder(new, out)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (out / "result").read_text() == content


def test_write_json_never_leaves_a_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"ä": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 1}

    def die(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"ä": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 1}


def test_link_falls_back_to_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
