"""What makes a job's text another text, and what does not."""

from __future__ import annotations

import os
from pathlib import Path

from tiny_folders import data_of

from regrow.data.sources import data_digest


def test_the_digest_depends_on_content_not_on_time(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two")
    first = data_digest(data_of(path))
    os.utime(path, (1, 1))
    assert data_digest(data_of(path)) == first
    path.write_text("one six")  # as long, and given the same time
    os.utime(path, (1, 2))
    assert data_digest(data_of(path)) != first
    assert data_digest(data_of(path, seed=5)) != data_digest(data_of(path))


def test_the_digest_depends_on_every_file_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    first = data_digest(data_of(folder))
    (folder / "b.txt").write_text("two")
    assert data_digest(data_of(folder)) != first
