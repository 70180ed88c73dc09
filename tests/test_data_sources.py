"""From names of sources to files and rows: files, folders, hub ids."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from regrow.data import SourceConfig
from regrow.data.sources import cache_folder, resolve, rows
from regrow.errors import UserError


def source(name: object, **fields: Any) -> SourceConfig:
    return SourceConfig(source=str(name), **fields)


def test_the_rows_of_a_file_have_locations(tmp_path: Path) -> None:
    path = tmp_path / "A.JSONL"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert resolve(source(path)) == [path]
    assert list(rows(source(path))) == [
        (f"{path}, row 1", {"text": "one"}),
        (f"{path}, row 2", {"text": "two"}),
    ]


def test_a_reader_by_name_beats_the_ending(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text('{"text": "one"}')
    assert [row for _, row in rows(source(path, reader="jsonl"))] == [{"text": "one"}]
    assert [row for _, row in rows(source(path, reader="text"))] == [{"text": '{"text": "one"}'}]
    with pytest.raises(UserError, match=r"notes: no reader for this ending; known: .*\.jsonl"):
        resolve(source(path))


def test_a_folder_gives_its_readable_files_sorted(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.jsonl", "a.txt", ".hidden/x.txt", "b/.y.txt", "c.csv", "d.txt.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    names = ["a.txt", "b/1.jsonl", "b/2.txt", "d.txt.gz"]
    assert resolve(source(tmp_path)) == [tmp_path / name for name in names]
    assert resolve(source(tmp_path, reader="jsonl")) == [tmp_path / "b/1.jsonl"]
    with pytest.raises(UserError, match="it has no file with one of the endings"):
        resolve(source(tmp_path, reader="parquet"))
    with pytest.raises(UserError, match="sha256 is for a single file"):
        resolve(source(tmp_path, sha256="0" * 64))


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    for name in (tmp_path / "no.txt", "data/no.jsonl", "data/no.txt.gz", "./no/such", "no"):
        with pytest.raises(UserError, match="no such file or folder"):
            list(rows(source(name)))


def test_another_sha256_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    right = hashlib.sha256(b"one").hexdigest()
    assert resolve(source(path, sha256=right.upper())) == [path]
    with pytest.raises(UserError, match=f"its SHA-256 is {right}, not {'0' * 64}"):
        resolve(source(path, sha256="0" * 64))


def test_the_cache_folder_can_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("REGROW_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/regrow")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/set", ("org/set", None, "train")),
        ("org/set-1.0:test", ("org/set-1.0", None, "test")),
        ("org/set@config-a", ("org/set", "config-a", "train")),
        ("org/set@a_b:validation", ("org/set", "a_b", "validation")),
    ],
)
def test_hub_ids_name_dataset_config_and_split(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: tuple[str, str | None, str]
) -> None:
    calls = []

    def load_dataset(path: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert streaming
        calls.append((path, config, split))
        return datasets.Dataset.from_list([{"text": "x"}, {"text": "y"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(rows(source(name))) == [
        (f"{name}, row 1", {"text": "x"}),
        (f"{name}, row 2", {"text": "y"}),
    ]
    assert calls == [expected]


def test_an_unreachable_hub_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"org/set: no such local path.*Couldn't reach it\)") as got:
        list(rows(source("org/set")))
    assert "\n" not in str(got.value)
    with pytest.raises(UserError, match="apply to files only"):
        list(rows(source("org/set", sha256="0" * 64)))


def test_a_folder_of_two_parts_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "set").mkdir(parents=True)
    (tmp_path / "org" / "set" / "a.jsonl").write_text(json.dumps({"text": "local"}))
    monkeypatch.chdir(tmp_path)
    assert [row for _, row in rows(source("org/set"))] == [{"text": "local"}]
