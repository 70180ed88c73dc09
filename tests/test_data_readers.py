"""Every reader: its rows, its .gz, its errors."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from regrow import plugins
from regrow.data import sources
from regrow.data.readers import jsonl, mediawiki, text
from regrow.data.readers import parquet as parquet_reader
from regrow.data.wikitext import sections
from regrow.errors import UserError

PARAGRAPHS = [f"Paragraph {n}. " + "word " * 150 + "end." for n in range(60)]  # ~770 characters
ROWS: list[dict[str, Any]] = [
    {"text": "Grüße,\nWelt", "id": 1},
    {"text": "zwei\u2028Zeilen", "id": 2},  # a line separator that is no end of a JSON line
]


def zipped(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def test_every_reader_has_endings_of_its_own() -> None:
    package = "regrow.data.readers"
    modules = [importlib.import_module(f"{package}.{name}") for name in plugins.names(package)]
    endings = [ending for module in modules for ending in module.ENDINGS]
    assert len(modules) >= 4
    assert all(ending == ending.lower() for ending in endings)
    assert len(set(endings)) == len(endings)
    assert all(callable(module.read) for module in modules)


def test_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    rows = [row["text"] for row in text.read(path)]
    assert "\n\n".join(rows) == "\n\n".join(PARAGRAPHS)  # nothing lost, cut only between paragraphs
    assert [len(row.split("\n\n")) for row in rows] == [11] * 5 + [5]
    assert list(text.read(zipped(path))) == [{"text": row} for row in rows]


def test_text_reads_windows_newlines_and_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert list(text.read(path)) == [{"text": "one\ntwo"}]


BROKEN: dict[str, tuple[str, bytes, Any, str]] = {
    "latin-1": ("a.txt", "Grüße".encode("latin-1"), text, r"a\.txt: not UTF-8 text"),
    "short gzip": ("a.txt.gz", gzip.compress(b"some text " * 1000)[:-20], text, "broken gzip"),
    "no gzip": ("a.txt.gz", b"no gzip at all", text, "broken gzip"),
    "no pages": ("pom.xml", b"<project><title>x</title></project>", mediawiki, "is it a MediaWiki"),
    "long number": (
        "a.jsonl",
        b'{"text": "one"}\n{"text": "two", "n": ' + b"1" * 6000 + b"}\n",
        jsonl,
        r"a\.jsonl:2: cannot be read \(Exceeds the limit",
    ),
    "deep lists": (
        "a.jsonl",
        b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        jsonl,
        r"a\.jsonl:1: lists and objects are nested too deeply",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused(kind: str, tmp_path: Path) -> None:
    name, content, reader, expected = BROKEN[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        list(reader.read(tmp_path / name))


@pytest.mark.parametrize("step", [1, 7, 64, 100_000])
def test_sections_do_not_depend_on_the_chunks(step: int) -> None:
    text = "\n\n".join(PARAGRAPHS[:9]) + "\n \n" + "no blank line " * 400 + "x" * 900
    chunks = [text[at : at + step] for at in range(0, len(text), step)]
    cut = list(sections(chunks, size=300))
    assert cut == list(sections([text], size=300))
    assert max(map(len, cut)) <= 600
    assert "".join("".join(cut).split()) == "".join(text.split())


def test_sections_fall_back_to_lines_then_spaces_then_anywhere() -> None:
    assert list(sections(["aaaa\nbbbbbbb\ncccccccccccccc"], size=8)) == [
        "aaaa\nbbbbbbb",
        "cccccccccccccc",
    ]
    assert list(sections(["aaaa bbbbbbb ccccccccccccccc"], size=8)) == [
        "aaaa bbbbbbb",
        "ccccccccccccccc",
    ]
    assert list(sections(["a" * 40], size=8)) == ["a" * 16, "a" * 16, "a" * 8]
    assert list(sections([" \n\n ", "\n"], size=8)) == []


def test_jsonl_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert list(jsonl.read(path)) == ROWS
    assert list(jsonl.read(zipped(path))) == ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "not JSON"),
        ("[1, 2]", "the line is a JSON list"),
        ("7", "the line is a JSON int"),
    ],
)
def test_jsonl_names_the_bad_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        list(jsonl.read(path))
    assert f"{path}:3: {message}" in str(caught.value)


def test_parquet_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows_written = [{"text": f"row {n}", "id": n} for n in range(3_000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows_written), path, row_group_size=700)
    assert list(parquet_reader.read(path)) == rows_written
    assert list(parquet_reader.read(zipped(path))) == rows_written
    path.write_text("no table")
    with pytest.raises(UserError, match="not a Parquet file"):
        list(parquet_reader.read(path))


PROSE = "Prose that is long enough to stay. " * 10
DUMP = f"""<mediawiki>
  <siteinfo><namespaces>
      <namespace key="0" />
      <namespace key="100">Portal</namespace>
      <namespace key="102">Kochbuch</namespace>
  </namespaces></siteinfo>
  <page><title>Old</title><revision><text xml:space="preserve">#redirect [[New]]
{PROSE}</text></revision>
  </page>
  <page>
    <title>Mission: Possible &amp; Done</title>
    <revision>
      <text xml:space="preserve">{{{{Infobox
| a = [[b]]
}}}}
'''It''' is &quot;[[thing|good]]&quot;&lt;ref&gt;no&lt;/ref&gt; &amp;ndash; {PROSE}
</text>
    </revision>
  </page>
  <page><title>Talk:Mission</title><revision><text>{PROSE}</text></revision></page>
  <page><title>Kochbuch:Suppe</title><revision><text>{PROSE}</text></revision></page>
  <page><title>Stub</title><revision><text>Short.</text></revision></page>
  <page><title>Empty</title><revision><text xml:space="preserve" /></revision></page>
  <page><title>Second</title><revision><text>{PROSE}</text></revision></page>
  <page><title>Cut off</title><revision><text>{PROSE} and then the fi"""


def test_mediawiki_articles_are_read_as_prose(tmp_path: Path) -> None:
    path = tmp_path / "dump.xml"
    path.write_bytes(DUMP.encode() + b"\xc3")  # enwik8 may end within a character
    rows = list(mediawiki.read(path))
    assert rows == [
        {"title": "Mission: Possible & Done", "text": f'It is "good" – {PROSE.strip()}'},
        {"title": "Second", "text": PROSE.strip()},
    ]
    assert list(mediawiki.read(zipped(path))) == rows


TOOL_ROWS: list[dict[str, Any]] = [
    {
        "text": "a table takes its keys from the first row",
        "messages": [
            {"role": "user", "content": "Rain?"},
            {
                "role": "assistant",
                "content": "I ask.",
                "tool_calls": [{"name": "rain", "arguments": {"city": "Paris", "days": [1, 2]}}],
            },
        ],
    },
    {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"country": "France"}}]}]},
    {"text": "Only text."},
]


def test_parquet_rows_have_only_the_keys_that_they_had(tmp_path: Path) -> None:
    """A table gives every row the keys of all rows; those that a row never had are null."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(TOOL_ROWS), path)
    assert '"country": null' in json.dumps(parquet.read_table(path).to_pylist())
    assert list(parquet_reader.read(path)) == TOOL_ROWS


def test_rows_of_the_hub_have_only_the_keys_that_they_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = datasets.Dataset.from_list(TOOL_ROWS)
    assert '"country": null' in json.dumps(list(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert list(sources.read("org/name")) == TOOL_ROWS
