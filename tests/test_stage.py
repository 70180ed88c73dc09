"""Every stage has one entry, and a new stage is a folder with such an entry and nothing else."""

from __future__ import annotations

from pathlib import Path

import doc_pages
import pytest
import torch
from tiny_job import call, refused, write_model, write_text

import regrow
from regrow import stage
from regrow.checkpoint import load
from regrow.config import Config
from regrow.stage import Stage


@pytest.mark.parametrize("name", stage.names())
def test_every_entry_has_its_config_summary_and_function(name: str) -> None:
    entry = stage.find(name)
    assert entry.name == name
    assert issubclass(entry.config, Config)
    assert entry.summary.endswith((".", ","))
    assert entry.function.__name__ == name
    assert getattr(regrow, name) is entry.function
    assert set(entry.uses) < set(stage.names()) - {name}
    if entry.in_recipes:
        assert type(entry).run is not Stage.run


def test_every_stage_is_a_public_name_for_type_checkers() -> None:
    assert set(stage.names()) <= set(regrow.__all__)


def test_the_page_on_stages_adds_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/add-a-stage.md to the letter: a command, a recipe, a dry run and a Python function."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("my-model"))
    write_text(Path("text.jsonl"))
    before = load("my-model")
    with doc_pages.written("add-a-stage.md", tmp_path):
        call("--help")
        assert "Store a model's weights in another" in capsys.readouterr().out
        for arguments in doc_pages.commands("add-a-stage.md"):
            call(*arguments)
        assert "cast: to float32" in capsys.readouterr().out
        for folder in ("my-model-float32", "my-run/model", "my-run/stages/01-cast"):
            after = load(folder)
            assert {after.dtype(name) for name in after.names()} == {"float32"}
            for name in before.names():
                assert torch.equal(before.tensor(name).float(), after.tensor(name))
        entry = stage.find("cast")
        assert entry.function("my-model", "again", entry.config(dtype="float16")) == Path("again")
        assert regrow.cast is entry.function
        override = ("--set", "stages.cast.dtype=bfloat16")
        message = refused(capsys, "run", "recipe.yaml", "--out", "refused", *override)
        assert message.startswith("stages.0.cast: the weights are bfloat16 already")
    assert "cast" not in stage.names()
