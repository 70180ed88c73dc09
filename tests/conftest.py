"""Fixtures of several test modules: text to profile on, and commands that must be refused."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_job
from tiny_folders import write_text
from tiny_job import Refused, write_job

from regrow import families
from regrow.training import text as text_module

# The same on every machine; test_precision.py is about machines without bfloat16.
os.environ["REGROW_PRECISION"] = "bfloat16"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to profile tiny models on."""
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", documents=120)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model, its profile, and text."""
    return write_job(tmp_path_factory.mktemp("bad_input"))


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(shared, tmp_path / "in"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; returns what it said."""
    return functools.partial(tiny_job.refused, capsys)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """All models mix documents; collects whether each text gets one document in a sequence."""
    found: list[bool] = []
    build = text_module.build_sequences

    def noted(*given: Any, **more: Any) -> Any:
        found.append(more["alone"])
        return build(*given, **more)

    monkeypatch.setattr(families, "mixes", lambda _: "its layers read across documents")
    monkeypatch.setattr(text_module, "build_sequences", noted)
    return found


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Path]:
    """A folder to write into, in which nothing may appear, nor beside it."""
    before = sorted(tmp_path.iterdir())
    yield tmp_path / "out"
    assert sorted(tmp_path.iterdir()) == before
