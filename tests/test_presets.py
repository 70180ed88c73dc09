"""Presets: each is a recipe that the checker accepts on a tiny model, and each runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_job import call, refused, write_model, write_text

from regrow.config import Options
from regrow.recipe import presets
from regrow.recipe import recipe as recipes

NEEDS = {"frontier-to-small": ("TEACHER", "PROMPTS"), "task-tiny": ("TEACHER",)}
EXPECTED = {
    *("minitron-width", "minitron-depth", "iterative-layers", "sheared", "family"),
    *("frontier-to-small", "on-policy", "task-half", "task-tiny", "edge-gguf"),
    *("budget-1m", "budget-10m", "budget-100m"),
}
SMALL: dict[str, dict[str, Any]] = {
    "profile": {"samples": 12},
    "prune": {"multiple_of": 8, "num_candidates": 1, "repair_tokens": 256},
    "reconstruct": {"tokens": 256, "validation_sequences": 4},
    "distill": {
        "tokens": 256,
        "batch_tokens": 128,
        "eval_tokens": 256,
        "heldout_sequences": 4,
        "on_policy_prompt_tokens": 8,
        "on_policy_new_tokens": 8,
    },
    "generate": {"max_new_tokens": 8, "keep_unfinished": True, "limit": 60},
    "quantize": {"samples": 8},
    "evaluate": {
        "metrics": ["perplexity"],
        "heldout_sequences": 4,
        "new_tokens": 4,
        "prefill_tokens": 16,
        "decode_tokens": 2,
        "repeats": 1,
    },
    "export": {"verify_tokens": 64},
}
"""Fields with which a tiny model and little text do, by stage."""
QUICK = {"budget-1m", "edge-gguf", "frontier-to-small", "minitron-depth", "on-policy", "task-tiny"}
"""Presets that run by default: together they have all stages and all inputs of presets."""
DEEP = {"iterative-layers"}
"""Presets that remove so few layers at a time that the model needs twelve."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("presets")
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 8}
    write_model(place / "model", **shape, num_hidden_layers=4)
    write_model(place / "deep", num_hidden_layers=12)
    write_model(place / "teacher", num_hidden_layers=4)
    text = write_text(place / "text.jsonl", documents=1000)
    rows = [json.dumps({"prompt": f"{number} the quick brown fox"}) for number in range(200)]
    (place / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return {
        "MODEL": str(place / "model"),
        "DEEP": str(place / "deep"),
        "DATA": (str(text),),
        "TEACHER": str(place / "teacher"),
        "PROMPTS": str(place / "prompts.jsonl"),
    }


def overrides(recipe: recipes.Recipe) -> list[str]:
    """--set for each stage of a recipe."""
    found = ["data.sequence_length=32", "data.calibration_fraction=0.3"]
    for number, step in enumerate(recipe.steps()):
        for key, value in SMALL.get(step.name, {}).items():
            found.append(f"stages.{number}.{step.name}.{key}={value}")
    return found


def tiny(name: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    words = ("MODEL", "DATA", *NEEDS.get(name, ()))
    own = {word: given[word] for word in words}
    if name in DEEP:
        own["MODEL"] = given["DEEP"]
    return own, overrides(recipes.read(f"preset:{name}", None, own))


def test_all_are_there() -> None:
    assert set(presets.names()) == EXPECTED
    for name in presets.names():
        assert presets.summary(name).endswith(".")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_is_accepted(name: str, given: dict[str, Any]) -> None:
    own, small = tiny(name, given)
    recipe = recipes.read(f"preset:{name}", small, own)
    assert recipe.model == own["MODEL"]
    recipes.check(recipe, Options(device="cpu"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in sorted(EXPECTED)
    ],
)
def test_each_runs(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    own, small = tiny(name, given)
    flags = [part for word in own for part in (presets.FLAGS[word], own[word])]
    flags = [part for each in flags for part in (each if isinstance(each, tuple) else (each,))]
    sets = [part for each in small for part in ("--set", each)]
    call("run", f"preset:{name}", *flags, *sets, "--out", tmp_path / "out", "--device", "cpu")
    assert (tmp_path / "out" / "model" / "config.json").exists()
    assert (tmp_path / "out" / "report.html").exists()
    assert "- base model: " in (tmp_path / "out" / "model" / "README.md").read_text()


def test_shares_follow_the_model(given: dict[str, Any]) -> None:
    words = {"MODEL": given["DEEP"], "DATA": given["DATA"]}
    assert recipes.read("preset:minitron-depth", None, words).stages[1] == {
        "prune": {"num_layers": 9}
    }
    width = recipes.read("preset:minitron-width", None, {w: given[w] for w in ("MODEL", "DATA")})
    assert width.stages[1] == {"prune": {"intermediate_size": 160}}  # 179 rounded down to 32


def test_mistakes(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, text = ("--model", given["MODEL"]), ("--data", *given["DATA"])
    out = ("--out", tmp_path / "out")
    cases: dict[str, tuple[object, ...]] = {
        "no preset named 'minitron-with' — did you mean 'minitron-width'?": (
            *("preset:minitron-with", *model, *text),
        ),
        "preset:budget-1m needs --data": ("preset:budget-1m", *model),
        "preset:task-tiny needs --teacher": ("preset:task-tiny", *model, *text),
        "preset:budget-1m has no use for --teacher: leave it out": (
            *("preset:budget-1m", *model, *text, "--teacher", "x"),
        ),
    }
    for said, arguments in cases.items():
        assert refused(capsys, "run", *arguments, *out).startswith(said)
    path = tmp_path / "recipe.yaml"
    path.write_text("model: x\ndata: y\nstages: [evaluate]\n")
    said = refused(capsys, "run", path, "--teacher", "z", *out)
    assert said == "--teacher is for presets: name it in the recipe's stages instead"
    read = recipes.read(path, None, {"MODEL": "other", "DATA": ("a.txt", "b.txt")})
    assert read.model == "other"
    assert [each.source for each in read.data.sources] == ["a.txt", "b.txt"]
