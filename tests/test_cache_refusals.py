"""Caches that do not fit: one line each, before the slow work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_cache import make_cache
from tiny_distillation import CONFIG, OPTIONS, data, write_place
from tiny_folders import data_of, write_model
from tiny_job import DISTILL, PROFILE, Refused, command, recipe_fields, write_recipe
from tiny_tokenizer import tiny_tokenizer

from regrow.checkpoint import Checkpoint
from regrow.data import DataConfig
from regrow.errors import UserError
from regrow.stages.cache import CacheConfig
from regrow.stages.cache.stage import cache
from regrow.stages.distill.stage import distill


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_place(tmp_path_factory.mktemp("place"))
    make_cache(place, place / "topk", format="topk")
    make_cache(place, place / "hidden", format="hidden")
    return place


class Distil:
    """Distils from a cache where that must be refused: nothing is written, no model is loaded."""

    def __init__(self, place: Path, out: Path) -> None:
        self.place, self.out = place, out

    def __call__(
        self,
        cached: str = "topk",
        student: Path | None = None,
        teacher: Path | None = None,
        text: DataConfig | None = None,
        **fields: Any,
    ) -> str:
        config = CONFIG.model_copy(update={"cache": str(self.place / cached), **fields})
        models = (student or self.place / "pruned", teacher or self.place / "teacher")
        with pytest.raises(UserError) as refused:
            distill(*models, text or data(self.place), self.out, config, OPTIONS)
        assert not self.out.exists()
        assert "\n" not in str(refused.value)
        return str(refused.value)


@pytest.fixture
def distil(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Distil:
    monkeypatch.setattr(Checkpoint, "model", lambda *_: pytest.fail("loads a model"))
    return Distil(place, tmp_path / "out")


def test_a_cache_of_another_teacher_is_refused(distil: Distil, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", dtype=torch.bfloat16, num_hidden_layers=3)
    message = distil(teacher=other.folder)
    assert message.startswith(f"the cache {distil.place}/topk was made with another teacher")
    assert "or make a cache of this one with regrow cache" in message


def test_a_cache_of_the_same_teacher_with_other_weights_is_refused(
    distil: Distil, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(distil.place / "teacher", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({n: w + 1 for n, w in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert "made with another teacher" in distil(teacher=other)


def test_a_student_with_another_tokenizer_is_refused(distil: Distil, tmp_path: Path) -> None:
    models = [shutil.copytree(distil.place / n, tmp_path / n) for n in ("pruned", "teacher")]
    for model in models:
        tiny_tokenizer(vocab_size=300).save_pretrained(str(model))
    message = distil(student=models[0], teacher=models[1])
    assert "was made with another tokenizer than that of" in message


def test_a_student_with_fewer_tokens_is_refused(distil: Distil, tmp_path: Path) -> None:
    student = Path(shutil.copytree(distil.place / "pruned", tmp_path / "student"))
    tiny_tokenizer(vocab_size=300).save_pretrained(str(student))
    message = distil("hidden", student=student)
    assert message.startswith("a cache is over the teacher's tokens, and the student has fewer")


def test_missing_sequences_are_refused(distil: Distil) -> None:
    message = distil(tokens=2 * CONFIG.tokens)
    assert message.startswith(
        f"48 of 96 train sequences are not in the cache {distil.place}/topk: "
    )
    assert f"with the same data and --tokens {2 * CONFIG.tokens} into that folder" in message
    message = distil(heldout_sequences=8)
    assert message.startswith("2 of 8 heldout sequences are not in the cache")
    assert "--heldout-sequences 8" in message


def test_sequences_of_another_length_are_refused(distil: Distil) -> None:
    message = distil(text=data_of(distil.place / "text.jsonl", sequence_length=64))
    assert "sequences have 64 tokens, those in the cache 32" in message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 2.0}, "temperature 2 needs all of the teacher's logits"),
        ({"feature_losses": {"hidden": 1.0}}, "feature losses need the live teacher"),
    ],
)
def test_losses_that_a_cache_cannot_serve_are_refused(
    distil: Distil, fields: dict[str, Any], expected: str
) -> None:
    assert distil(**fields).startswith(expected)
    if "feature_losses" in fields:
        assert distil("hidden", **fields).startswith(expected)


def test_hidden_states_serve_any_temperature(place: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"cache": str(place / "hidden"), "temperature": 2.0})
    arguments = (place / "pruned", place / "teacher", data(place), tmp_path / "out")
    assert distill(*arguments, config, OPTIONS).exists()


def test_a_missing_or_broken_cache_is_refused(distil: Distil, tmp_path: Path) -> None:
    assert distil("none").startswith(f"no cache at {distil.place}/none: make one with regrow cache")
    copy = Path(shutil.copytree(distil.place / "topk", tmp_path / "copy"))
    shard = next((copy / "train").iterdir())
    os.truncate(shard, shard.stat().st_size - 1)
    assert distil(str(copy)).startswith(f"{shard} is broken: delete it and run regrow cache again")
    (copy / "cache.json").write_text('{"version": 7}')
    assert "is no cache of version 1" in distil(str(copy))
    (copy / "cache.json").write_text("{")
    assert "is not valid JSON" in distil(str(copy))


def test_a_teacher_whose_states_overflow_is_refused(place: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(place / "teacher", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38  # finite, and larger than bfloat16 can multiply
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="gives hidden states that are not finite"):
        cache(other, data(place), tmp_path / "cache", CacheConfig(tokens=128), OPTIONS)
    assert not (tmp_path / "cache").exists()


def test_more_stored_ids_than_the_vocabulary_has_are_refused(place: Path, tmp_path: Path) -> None:
    config = CacheConfig(format="topk", k=100_000)
    with pytest.raises(UserError, match="k 100000: give 1 to "):
        cache(place / "teacher", data(place), tmp_path / "cache", config, OPTIONS)
    assert not list(tmp_path.iterdir())


CACHE: dict[str, Any] = {"cache": {}}
RECIPES: dict[str, tuple[list[Any], str]] = {
    "temperature": (
        [CACHE, {"distill": {**DISTILL["distill"], "temperature": 2.0}}],
        "stages.1.distill: temperature 2 needs all of the teacher's logits",
    ),
    "feature_losses": (
        [CACHE, {"distill": {**DISTILL["distill"], "feature_losses": {"hidden": 1.0}}}],
        "stages.1.distill: feature losses need the live teacher",
    ),
    "vocabulary": (
        [PROFILE, CACHE, {"prune": {"vocab_size": 288}}, DISTILL],
        "stages.3.distill: a cache is over the teacher's tokens",
    ),
    "no such cache": (
        [{"distill": {**DISTILL["distill"], "cache": "nowhere"}}],
        "stages.0.distill: no cache at nowhere",
    ),
    "settings": (
        [{"cache": {"format": "topk", "k": 5000}}],
        "stages.0.cache: k 5000: give 1 to",
    ),
    "another format's": (
        [{"cache": {"k": 64}}],
        "stages.0.cache: k is of format topk, this is samples",
    ),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes_with_an_unusable_cache_are_refused(
    kind: str, shared: Path, tmp_path: Path, untouched: Path, refused: Refused
) -> None:
    stages, expected = RECIPES[kind]
    fields = recipe_fields(shared / "model", shared / "text.jsonl", *stages)
    recipe = write_recipe(shared / "cached.yaml", fields)
    assert refused("run", recipe, "--out", untouched).startswith(expected)


def test_dry_run_tells_of_a_cache_that_does_not_fit(
    shared: Path, untouched: Path, refused: Refused
) -> None:
    arguments = command("distill", shared, shared / "model", untouched)
    assert "no cache at" in refused(*arguments, "--cache", "nowhere", "--dry-run")
