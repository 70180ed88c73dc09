"""Every stage has one entry, and a new stage is a folder with such an entry and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_job import call, recipe_fields, write_job

import regrow
from regrow import stage, stages
from regrow.config import Config
from regrow.stage import Stage

ENTRY = '''"""Note: write the words of a note beside the current model."""

from __future__ import annotations

from pathlib import Path

from regrow.config import Config
from regrow.errors import UserError
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model


class NoteConfig(Config):
    """The note."""

    words: str = "hello"
    """What to write."""


class NoteStage(Stage):
    """Takes the current model; leaves a note."""

    config = NoteConfig

    def command(self, model: Model, out: Path, words: str = "hello") -> None:
        """Write a note about a model."""
        from regrow.stages.note.stage import note

        note(model, out, NoteConfig(words=words))

    def check(self, step: Step, plan: RecipePlan) -> None:
        if not step.config.words:
            raise UserError("words is empty: give some")

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        return [f"note: {step.config.words!r}"]

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        from regrow.stages.note.stage import note

        note(run.current, run.folder(folder), step.config)


STAGE = NoteStage()
'''
FUNCTION = '''"""The note stage."""

import json
from pathlib import Path


def note(model, out, config):
    """Write the note."""
    Path(out).mkdir(parents=True)
    said = {"model": str(model), "words": config.words}
    (Path(out) / "note.json").write_text(json.dumps(said))
    return Path(out)
'''


@pytest.mark.parametrize("name", stage.names())
def test_an_entry(name: str) -> None:
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


@pytest.fixture
def with_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `note` among the stages."""
    folder = tmp_path / "stages" / "note"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(ENTRY)
    (folder / "stage.py").write_text(FUNCTION)
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(folder.parent)])
    return folder


def test_a_new_stage_is_one_folder(
    with_note: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs from the command line, from a recipe, in a dry run, and as a function."""
    place = write_job(tmp_path / "job")
    model, out = place / "model", tmp_path / "out"
    call("--help")
    assert "Write a note about a model." in capsys.readouterr().out
    call("note", model, "--out", out, "--words", "by hand")
    assert json.loads((out / "note.json").read_text())["words"] == "by hand"

    fields = recipe_fields(model, place / "text.jsonl", {"note": {"words": "by recipe"}})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    call("run", recipe, "--out", tmp_path / "run", "--dry-run")
    assert "note: 'by recipe'" in capsys.readouterr().out
    call("run", recipe, "--out", tmp_path / "run")
    written = json.loads((tmp_path / "run" / "stages" / "01-note" / "note.json").read_text())
    assert written == {"model": str(model), "words": "by recipe"}

    config = stage.find("note").config(words="by function")
    assert regrow.note(model, tmp_path / "third", config) == tmp_path / "third"
    fields["stages"] = [{"note": {"words": ""}}]
    recipe.write_text(yaml.safe_dump(fields))
    with pytest.raises(regrow.UserError, match=r"stages\.0\.note: words is empty"):
        regrow.run(recipe, tmp_path / "refused")
