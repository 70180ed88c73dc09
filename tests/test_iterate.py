"""Rounds in a recipe: what `iterate` stands for, and its examples on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_folders import write_model, write_text

from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.errors import UserError
from regrow.recipe import recipe
from regrow.recipe.iterate import expand
from regrow.stage_dir import read as read_manifest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_rounds_by_hand() -> None:
    given = [
        "report",
        {
            "iterate": {
                "distill": {"tokens": [5, 7], "losses": {"jsd": 1}},
                "prune": {"keep_params": [0.8, 0.6], "repair": False},
            }
        },
        {"iterate": {"prune": {"num_layers": [3, 2]}, "profile": {"samples": 4}}},
    ]
    assert expand(given) == [
        "report",
        {"profile": {}},
        {"prune": {"keep_params": 0.8, "repair": False}},
        {"distill": {"tokens": 5, "losses": {"jsd": 1}}},
        {"profile": {}},
        {"prune": {"keep_params": 0.75, "repair": False}},
        {"distill": {"tokens": 7, "losses": {"jsd": 1}}},
        {"profile": {"samples": 4}},
        {"prune": {"num_layers": 3}},
        {"profile": {"samples": 4}},
        {"prune": {"num_layers": 2}},
    ]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prune": {"keep_params": 0.5}}, "lists given: none"),
        ({"prune": {"keep_params": [0.8], "num_layers": [3]}}, "keep_params, num_layers"),
        ({"prune": {"keep_params": [0.8, 0.9]}}, "below the one before"),
        ({"prune": {"keep_params": [0.8, 0.4]}}, "such as 0.57"),
        ({"prune": {"keep_params": [0.8, 0.7]}, "distill": {"tokens": [1]}}, "1 numbers for 2"),
        ({"evaluate": {}}, "give the fields of profile, prune"),
        ([0.8], "give the fields of profile, prune"),
    ],
)
def test_rounds_that_are_refused(tmp_path: Path, fields: Any, told: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "data": "d", "stages": [{"iterate": fields}]}))
    with pytest.raises(UserError, match=told):
        recipe.read(path)


TINY: dict[str, dict[str, Any]] = {
    "profile": {"samples": 16, "gram_tokens": 512},
    "prune": {"repair": False, "multiple_of": 1},
    "distill": {"tokens": 256, "batch_tokens": 128, "eval_tokens": 128, "heldout_sequences": 2},
    "generate": {"max_new_tokens": 6, "keep_unfinished": True, "limit": 12, "split": "all"},
    "prefer": {"max_new_tokens": 6, "keep_unfinished": True, "min_margin": 0.0, "limit": 6},
    "evaluate": {"metrics": ["size", "kl"], "heldout_sequences": 4},
}
SIZES: dict[str, dict[str, Any]] = {
    "family.yaml": {"keep_params": [0.8, 0.64]},
    "chain_of_teachers.yaml": {"keep_params": [0.8, 0.64]},
    "layer_by_layer.yaml": {"num_layers": [3, 2]},
}


def tiny(name: str, place: Path) -> dict[str, Any]:
    """The example with the tiny model and text, and with small sizes in its stages."""
    fields: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    fields["model"] = str(place / "model")
    text = [str(place / "text.jsonl")]
    fields["data"] = {"sources": text, "sequence_length": 32, "heldout_fraction": 0.1}
    stages = []
    for entry in fields["stages"]:
        if isinstance(entry, dict) and "iterate" in entry:
            inner = {each: small(each, given) for each, given in entry["iterate"].items()}
            inner["prune"] |= SIZES[name]
            stages.append({"iterate": inner})
        elif entry != "report":
            key = entry if isinstance(entry, str) else next(iter(entry))
            stages.append({key: small(key, {} if isinstance(entry, str) else entry[key])})
    fields["stages"] = stages
    return fields


def small(stage: str, given: dict[str, Any]) -> dict[str, Any]:
    made = {**given, **TINY.get(stage, {})}
    if "prompts" in made:
        made["prompts"] = str(EXAMPLES / "prompts.jsonl")
    if stage == "profile" and "criteria" in given:
        del made["gram_tokens"]
    if "intermediate_size" in given:
        made["intermediate_size"] = given["intermediate_size"] * 56 // 1536
    if "num_layers" in given:
        made["num_layers"] = 3
    if stage == "distill" and "on_policy_share" in given:
        made |= {"on_policy_prompt_tokens": 6, "on_policy_new_tokens": 8}
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("iterate")
    write_model(place / "model", num_hidden_layers=4)
    write_text(place / "text.jsonl")
    return place


@pytest.mark.parametrize(
    "name",
    [
        "family.yaml",
        "chain_of_teachers.yaml",
        "teacher_correction.yaml",
        "layer_by_layer.yaml",
        "answers_and_preferences.yaml",
        "contrastive.yaml",
        "two_rounds.yaml",
    ],
)
def test_the_examples_run(place: Path, tmp_path: Path, name: str) -> None:
    """All sizes are kept and measured; each student learned from the teacher that it should."""
    if "preferences" in name:
        pytest.importorskip("trl")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny(name, place), sort_keys=False))
    out = recipe.run(path, tmp_path / "out", Options(device="cpu"))
    folders = sorted(path for path in (out / "stages").iterdir() if path.is_dir())
    distilled = [path for path in folders if path.name.endswith("distill")]
    teachers = [(read_manifest(path) or {})["inputs"]["teacher"] for path in distilled]
    first = Checkpoint(place / "model").fingerprint
    sizes = [sum(_count(s) for s in Checkpoint(path).shapes.values()) for path in distilled]
    if name in ("family.yaml", "layer_by_layer.yaml"):
        assert teachers == [first, first]
        assert sizes[0] > sizes[1]
    if name == "chain_of_teachers.yaml":
        assert teachers == [first, Checkpoint(distilled[0]).fingerprint]
    if name == "teacher_correction.yaml":
        assert teachers == [first, Checkpoint(distilled[0]).fingerprint]
        assert Checkpoint(distilled[0]).fingerprint != first
    if name == "layer_by_layer.yaml":
        assert [Checkpoint(p).config["num_hidden_layers"] for p in distilled] == [3, 2]
    if name == "answers_and_preferences.yaml":
        assert Checkpoint(out / "model").fingerprint == Checkpoint(folders[-2]).fingerprint
        assert folders[-2].name.endswith("prefer")
    (measured,) = (path for path in folders if path.name.endswith("evaluate"))
    labels = json.loads((measured / "evaluation.json").read_text())["figures"]
    assert sum(label.startswith("distilled") for label in labels) == len(distilled)


def _count(shape: Any) -> int:
    size = 1
    for each in shape:
        size *= each
    return size


def test_learning_from_the_model_before_a_prune_needs_one(place: Path, tmp_path: Path) -> None:
    fields = tiny("family.yaml", place)
    fields["stages"] = [{"distill": {**TINY["distill"], "learn_from": "before_prune"}}]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(UserError, match="no prune stage before it"):
        recipe.run(path, tmp_path / "out", Options(device="cpu"))
