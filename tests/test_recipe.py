"""A recipe from end to end: what is skipped, redone, resumed and kept."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_job import (
    DISTILL,
    EVALUATE,
    PROFILE,
    PRUNE,
    recipe_fields,
    write_model,
    write_recipe,
    write_text,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrow import ExportConfig, export
from regrow.checkpoint import Checkpoint, identity, load
from regrow.recipe.recipe import Recipe, run
from regrow.recipe.recipe import read as read_recipe
from regrow.stage_dir import read as read_manifest

Said = Callable[[], list[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("recipe")
    write_model(place / "model")
    write_text(place / "text.jsonl")
    return place


@pytest.fixture
def output_of(capsys: pytest.CaptureFixture[str]) -> Said:
    """The lines of news since the last call."""
    return lambda: capsys.readouterr().err.splitlines()


def recipe_of(place: Path, *stages: Any) -> Recipe:
    return Recipe.model_validate(recipe_fields(place / "model", place / "text.jsonl", *stages))


def changed(stage: dict[str, Any], **fields: Any) -> dict[str, Any]:
    ((name, fields_before),) = stage.items()
    return {name: {**fields_before, **fields}}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def times(folder: Path) -> dict[str, int]:
    """Time of change of every file of the stages."""
    files = (path for path in sorted(folder.glob("stages/*/**/*")) if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def written(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """The stages of which a file is new or changed."""
    return {name.split("/")[1] for name in after if before.get(name) != after[name]}


def skipped(lines: list[str]) -> list[str]:
    return [line.split("/")[-1] for line in lines if line.endswith("is complete and unchanged")]


def test_each_tokenizer_is_read_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each finished checkpoint opened once, in a run of four stages."""
    read: list[str] = []
    opened: list[str] = []
    from_pretrained, init = AutoTokenizer.from_pretrained, Checkpoint.__init__

    def counted(folder: str, *args: Any, **kwargs: Any) -> Any:
        read.append(folder)
        return from_pretrained(folder, *args, **kwargs)

    def begun(self: Checkpoint, folder: str | Path, *args: Any, **kwargs: Any) -> None:
        opened.append(str(folder))
        init(self, folder, *args, **kwargs)

    monkeypatch.setattr("regrow.checkpoint.tokenizer_files._read", {})
    monkeypatch.setattr("regrow.checkpoint.checkpoint._opened", {})
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)
    monkeypatch.setattr(Checkpoint, "__init__", begun)
    run(recipe_of(place), tmp_path / "out")
    assert read == [str(place / "model")]  # the student's is a copy of it
    assert len(opened) == len(set(opened)) == 6


STAGES = ["01-profile", "02-prune", "02-prune-repaired", "03-distill", "04-evaluate"]
UNCHANGED = [f"{name} is complete and unchanged" for name in STAGES]


def test_a_recipe_runs_end_to_end_and_is_skipped_the_second_time(
    place: Path, tmp_path: Path, output_of: Said
) -> None:
    """The model, the journal and the evaluation; the second run does nothing, and at once."""
    recipe, out = recipe_of(place), tmp_path / "run"
    assert run(recipe, out) == out
    assert sorted(path.name for path in (out / "stages").iterdir()) == STAGES
    assert {path.name for path in out.iterdir()} == {
        *("stages", "model", "metrics.jsonl", "recipe.yaml")
    }
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.intermediate_size == 40
    last = load_file(out / "stages" / "03-distill" / "model.safetensors")
    assert torch.equal(
        load_file(out / "model" / "model.safetensors")["model.norm.weight"],
        last["model.norm.weight"],
    )
    evaluation = json.loads((out / "stages" / "04-evaluate" / "evaluation.json").read_text())
    assert evaluation["labels"] == ["teacher", "pruned", "repaired", "distilled"]
    assert {row["stage"] for row in rows(out / "metrics.jsonl")} == {"03-distill"}
    assert read_recipe(out / "recipe.yaml") == recipe

    before, journal = times(out), (out / "metrics.jsonl").read_text()
    output_of()
    start = time.monotonic()
    run(recipe, out)
    assert time.monotonic() - start < 2
    lines = output_of()
    assert set(UNCHANGED) == set(skipped(lines))
    assert times(out) == before
    assert (out / "metrics.jsonl").read_text() == journal


CHANGES: dict[str, tuple[list[Any], set[str]]] = {
    "evaluate": (
        [PROFILE, PRUNE, DISTILL, changed(EVALUATE, heldout_sequences=3)],
        set(STAGES[4:]),
    ),
    "distill": ([PROFILE, PRUNE, changed(DISTILL, learning_rate=3e-4), EVALUATE], set(STAGES[3:])),
    "prune": ([PROFILE, changed(PRUNE, intermediate_size=32), DISTILL, EVALUATE], set(STAGES[1:])),
    "profile": ([changed(PROFILE, samples=17), PRUNE, DISTILL, EVALUATE], set(STAGES)),
}


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    run(recipe_of(place), place / "finished")
    return place / "finished"


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_reruns_only_the_stages_after_it(
    kind: str, place: Path, tmp_path: Path, finished: Path
) -> None:
    out = copy(finished, tmp_path / "run")
    before = times(out)
    stages, expected = CHANGES[kind]
    run(recipe_of(place, *stages), out)
    assert written(before, times(out)) == expected
    check_journal(out / "metrics.jsonl", steps=10, interval=2)


def copy(run_folder: Path, out: Path) -> Path:
    subprocess.run(["cp", "-a", str(run_folder), str(out)], check=True)
    return out


def check_journal(path: Path, steps: int, interval: int) -> None:
    """Each step exactly once, in order; each measurement too."""
    journal = rows(path)
    assert [row["step"] for row in journal if "loss" in row] == list(range(1, steps + 1))
    assert [row["step"] for row in journal if "heldout_kl" in row] == list(
        range(0, steps + 1, interval)
    )
    assert [row["tokens"] for row in journal] == [128 * row["step"] for row in journal]


def test_changed_data_reruns_every_stage(place: Path, tmp_path: Path, finished: Path) -> None:
    out = copy(finished, tmp_path / "run")
    before = times(out)
    fields = recipe_fields(place / "model", place / "text.jsonl")
    fields["data"]["seed"] = 1
    run(Recipe.model_validate(fields), out)
    assert written(before, times(out)) == set(STAGES)


def test_a_larger_budget_extends_the_distillation(
    place: Path, tmp_path: Path, finished: Path, output_of: Said
) -> None:
    """The first steps are not done again; the new ones follow."""
    out = copy(finished, tmp_path / "run")
    first = rows(out / "metrics.jsonl")
    run(recipe_of(place, PROFILE, PRUNE, changed(DISTILL, tokens=2048), EVALUATE), out)
    lines = output_of()
    assert "distill: extends a run of 1,280 tokens" in lines
    assert "distill: continues from checkpoint-10" in lines
    assert rows(out / "metrics.jsonl")[: len(first)] == first
    check_journal(out / "metrics.jsonl", steps=16, interval=2)
    check_journal(out / "stages" / "03-distill" / "metrics.jsonl", steps=16, interval=2)


def test_overrides_set_fields_by_name_or_position(place: Path, tmp_path: Path) -> None:
    """Dotted keys, by a stage's name or position; a bare stage gets fields."""
    fields = recipe_fields(place / "model", place / "text.jsonl", "profile", "prune", PROFILE)
    path = write_recipe(tmp_path / "recipe.yaml", fields)
    overrides = ["stages.prune.num_layers=2", "stages.0.profile.samples=3", "data.seed=7"]
    overrides += ["stages.2.profile.criteria=[random, magnitude]", "model=elsewhere"]
    recipe = read_recipe(path, overrides)
    assert recipe.stages[:2] == [{"profile": {"samples": 3}}, {"prune": {"num_layers": 2}}]
    assert recipe.steps()[2].config.criteria == ("random", "magnitude")
    assert recipe.data.seed == 7
    assert recipe.model == "elsewhere"


def test_two_rounds_of_pruning_run_in_one_recipe(place: Path, tmp_path: Path) -> None:
    """The second cut starts from the first one's distilled model; each is evaluated."""
    second_prune = changed(PRUNE, intermediate_size=24)
    recipe = recipe_of(place, PROFILE, PRUNE, DISTILL, PROFILE, second_prune, DISTILL, EVALUATE)
    out = run(recipe, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.intermediate_size == 24
    second = read_manifest(out / "stages" / "04-profile")
    assert second is not None
    assert second["inputs"]["model"] == load(out / "stages" / "03-distill").fingerprint
    taught = read_manifest(out / "stages" / "06-distill")
    assert taught is not None
    assert taught["inputs"]["teacher"] == load(place / "model").fingerprint
    evaluation = json.loads((out / "stages" / "07-evaluate" / "evaluation.json").read_text())
    labels = ["pruned", "repaired", "distilled"]
    assert evaluation["labels"] == ["teacher", *labels, *(f"{label} 2" for label in labels)]
    assert {row["stage"] for row in rows(out / "metrics.jsonl")} == {"03-distill", "06-distill"}


def test_a_stage_can_have_its_own_teacher(place: Path, tmp_path: Path) -> None:
    """Named in the stage; by default the recipe's model."""
    other = write_model(tmp_path / "other", intermediate_size=64)
    distill = changed(DISTILL, teacher=str(other))
    against = changed(EVALUATE, teacher=str(other), metrics=["kl"])
    out = run(recipe_of(place, PROFILE, PRUNE, distill, against), tmp_path / "run")
    taught = read_manifest(out / "stages" / "03-distill")
    assert taught is not None
    assert taught["inputs"]["teacher"] == load(other).fingerprint
    evaluation = json.loads((out / "stages" / "04-evaluate" / "evaluation.json").read_text())
    figures = {label: [f["name"] for f in rows] for label, rows in evaluation["figures"].items()}
    assert figures[evaluation["teacher"]] == []
    assert all(
        "kl/heldout" in names for label, names in figures.items() if label != evaluation["teacher"]
    )


def test_keep_last_deletes_earlier_weights(place: Path, tmp_path: Path, output_of: Said) -> None:
    """Weights stay in model/ only; the job is known to be done, and a changed one is redone."""
    recipe, out = recipe_of(place), tmp_path / "run"
    run(recipe, out, keep_stages="last")
    assert [path.parent for path in out.rglob("*.safetensors") if path.stat().st_size > 20_000] == [
        out / "model"
    ]
    assert not list(out.rglob("trainer")) + list(out.rglob("grams"))
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.intermediate_size == 40
    output_of()
    before = times(out)
    run(recipe, out, keep_stages="last")
    opening, unchanged = output_of()
    assert opening.startswith("run: opening ")
    assert unchanged == f"run: {out} is complete and unchanged"
    assert times(out) == before
    run(recipe_of(place, PROFILE, PRUNE, changed(DISTILL, tokens=1536), EVALUATE), out)
    check_journal(out / "metrics.jsonl", steps=12, interval=2)
    assert len(list(out.glob("stages/*/model.safetensors"))) == 3


@pytest.mark.skipif(find_spec("gguf") is None, reason="needs the extra gguf")
def test_a_recipe_accepts_a_gguf_file_as_model(place: Path, tmp_path: Path) -> None:
    """Its teacher is measured by transformers, from the folder that the file was converted to."""
    file = tmp_path / "teacher.gguf"
    export(place / "model", file, ExportConfig(type="F32", verify="never"))
    measuring = {"evaluate": {**EVALUATE["evaluate"], "metrics": ["perplexity", "kl"]}}
    fields = recipe_fields(file, place / "text.jsonl", PROFILE, PRUNE, measuring)
    out = run(write_recipe(tmp_path / "recipe.yaml", fields), tmp_path / "run")
    evaluation = json.loads((out / "stages" / "03-evaluate" / "evaluation.json").read_text())
    assert evaluation["labels"] == ["teacher", "pruned", "repaired"]
    with_kl = [
        label
        for label, figures in evaluation["figures"].items()
        if "kl/heldout" in {figure["name"] for figure in figures}
    ]
    assert with_kl == ["pruned", "repaired"]
