"""Shorthands, ranges and one-line errors of the data configs; no torch behind them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from regrow.config import parse
from regrow.data import DataConfig, SourceConfig
from regrow.errors import UserError


@pytest.mark.parametrize(
    "value",
    [
        "a.txt",
        ["a.txt"],
        [{"source": "a.txt"}],
        {"source": "a.txt"},
        {"sources": "a.txt"},
        {"sources": ["a.txt"]},
    ],
)
def test_shorthands_equal_the_full_form(value: Any) -> None:
    expected = DataConfig(sources=[SourceConfig(source="a.txt")])
    assert parse(DataConfig, value, "data") == expected
    assert parse(DataConfig, value, "data").digest() == expected.digest()


def test_list_mixes_strings_and_mappings() -> None:
    data = parse(DataConfig, ["a.txt", {"source": "b", "weight": 3, "reader": "jsonl"}], "data")
    assert [(s.source, s.weight, s.reader) for s in data.sources] == [
        ("a.txt", 1.0, None),
        ("b", 3.0, "jsonl"),
    ]
    assert (data.sequence_length, data.heldout_fraction, data.calibration_fraction) == (
        512,
        0.05,
        0.15,
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "data.sources: the list is empty: give at least one file"),
        ({"sources": "a", "heldout_fraction": 0}, "data.heldout_fraction: Input should be greater"),
        (
            {"sources": "a", "heldout_fraction": 0.9},
            "data.calibration_fraction: together with heldout_frac",
        ),
        ({"sources": "a", "sequence_length": 7}, "data.sequence_length: Input should be greater"),
        ([{"source": "a", "weight": 0}], "data.sources.0.weight: Input should be greater"),
        ([{"source": "a", "weight": float("inf")}], "data.sources.0.weight: Input should be a fin"),
        ([{"source": "a", "sha256": "beef"}], "data.sources.0.sha256: String should match"),
        ([{"source": "a", "reader": "jsnl"}], "no such reader — did you mean 'jsonl'?"),
        ([{"source": "a", "wieght": 2}], "unknown key — did you mean 'weight'?"),
    ],
)
def test_mistakes_are_reported_in_one_line(value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(DataConfig, value, "data")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_field_has_help() -> None:
    for kind in (DataConfig, SourceConfig):
        assert all(field.description for field in kind.model_fields.values())


def test_configs_import_without_torch() -> None:
    code = "import sys; import regrow.data.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_text_instead_of_a_path_is_refused_in_one_line() -> None:
    text = "This text is too long for the name of a file. " * 8
    with pytest.raises(UserError, match=r"… is no file or folder .*: give the path") as caught:
        parse(DataConfig, {"sources": [text]}, "data")
    assert "\n" not in str(caught.value)
