"""A cache in a recipe: fitted to the distillations that follow, taken by them, extended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_job import DISTILL, PROFILE, PRUNE, call, command, recipe_fields, write_text
from tiny_job import write_model as write_tiny

from regrow.checkpoint import Checkpoint
from regrow.recipe.recipe import Recipe, run
from regrow.stage_dir import read
from regrow.stages.cache import fitted
from regrow.stages.distill.config import DistillConfig

STAGES = ("01-profile", "02-prune", "03-cache", "04-distill")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cached")
    write_tiny(place / "model")
    write_text(place / "text.jsonl")
    return place


def recipe_of(place: Path, cache: dict[str, Any], tokens: int = 1280) -> Recipe:
    plain = {"prune": {**PRUNE["prune"], "repair": False}}
    trained = {"distill": {**DISTILL["distill"], "tokens": tokens}}
    stages = [PROFILE, plain, {"cache": cache}, trained, "report"]
    fields = recipe_fields(place / "model", place / "text.jsonl", *stages)
    return Recipe.model_validate(fields)


def manifests(out: Path) -> dict[str, dict[str, Any]]:
    return {name: read(out / "stages" / name) or {} for name in STAGES}


def test_a_recipe_caches_a_teacher_and_distils_from_the_cache(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much is cached as is taken; a raised budget extends both; a move changes nothing."""
    out = run(recipe_of(place, {}), tmp_path / "a" / "run")
    first = manifests(out)
    assert first["03-cache"]["config"]["tokens"] == 1280
    assert first["03-cache"]["config"]["heldout_sequences"] == 4
    assert "cache" in first["04-distill"]["inputs"]
    assert "03-cache" in (out / "report.html").read_text()
    (tmp_path / "a").rename(tmp_path / "b")
    out = tmp_path / "b" / "run"
    run(recipe_of(place, {}), out)
    assert manifests(out) == first
    shards = set((out / "stages" / "03-cache" / "train").iterdir())
    run(recipe_of(place, {}, tokens=1408), out)
    assert shards < set((out / "stages" / "03-cache" / "train").iterdir())
    assert manifests(out)["04-distill"]["config"]["tokens"] == 1408
    monkeypatch.setattr(Checkpoint, "model", lambda *_: pytest.fail("loads a model"))
    run(recipe_of(place, {}, tokens=1408), out, keep_stages="last")
    left = {path.parent.name for path in (out / "stages").rglob("*.safetensors")}
    assert left == {"01-profile"}


def test_a_cache_is_as_large_as_the_largest_distillation_needs(place: Path) -> None:
    """Whole steps of it; another teacher's, or one before, do not count; what is given stays."""
    fields = recipe_fields(
        "m",
        place / "text.jsonl",
        {"distill": {"tokens": 90_000}},
        {"cache": {}},
        {"distill": {"tokens": 1000, "batch_tokens": 384, "heldout_sequences": 9}},
        {"distill": {"tokens": 600}},
        {"distill": {"tokens": 80_000, "teacher": "other"}},
    )
    steps = Recipe.model_validate(fields).steps()
    fitted_steps = fitted(steps[1], steps, "m")
    assert (fitted_steps.tokens, fitted_steps.heldout_sequences) == (1152, 16)
    fields["stages"][1] = {"cache": {"tokens": 5}}
    steps = Recipe.model_validate(fields).steps()
    assert fitted(steps[1], steps, "m").tokens == 5


def test_the_commands_describe_write_and_use_a_cache(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is cached, how exactly, and a student that is taught by it."""
    arguments = command("cache", place, place / "model", tmp_path / "cache")
    call(*arguments, "--dry-run")
    output = capsys.readouterr().out
    assert "cache: samples, 512 tokens to train on and 64 held out" in output
    assert "bytes per token" in output
    assert not (tmp_path / "cache").exists()
    call(*arguments, "--format", "samples", "--draws", 32)
    output = capsys.readouterr().err
    for text in ("bytes per token", "cache: speed", "tokens/s", "cache: error", "noise of zero"):
        assert text in output
    distil = command("distill", place, place / "model", tmp_path / "out")
    call(*distil, "--cache", tmp_path / "cache")
    manifest = read(tmp_path / "out")
    assert manifest is not None
    assert DistillConfig.model_validate(manifest["config"]).tokens == 512
