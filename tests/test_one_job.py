"""One job: the data's answers are exact and kept apart, and the example's recipe runs whole."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import yaml
from tiny_job import write_model

from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.errors import UserError
from regrow.recipe import recipe
from regrow.stage_dir import read as read_manifest

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA: dict[str, Any] = {
    "expansion_rules": {"the": "(the|my)", "light": "[<the>] (light|lamp)[s]"},
    "lists": {
        "percent": {"range": {"from": 0, "to": 100, "step": 10}},
        "down": {"range": {"from": 1, "to": 3, "multiplier": -1}},
        "colour": {"values": [{"in": "(red|crimson)", "out": "red"}, "blue"]},
        "message": {"wildcard": True},
    },
    "intents": {
        "HassTurnOn": {
            "data": [
                {
                    "metadata": {"slot_combination": "area"},
                    "slots": {"domain": "light"},
                    "sentences": ["turn on <light> in {area}", "<light> on in {area}", "{area} on"],
                },
                {
                    "metadata": {"slot_combination": "name"},
                    "requires_context": {"domain": ["fan"]},
                    "sentences": ["start {name}", "run {name}", "say {message}"],
                },
            ]
        },
        "HassSet": {
            "data": [
                {
                    "metadata": {"slot_combination": "value"},
                    "sentences": ["(set <light>;to {percent:value}%)", "dim by {down:value}"],
                },
                {"metadata": {"slot_combination": "hue"}, "sentences": ["make it {colour:hue}"]},
            ]
        },
    },
}


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_job_data", EXAMPLES / "one_job_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_sentences_say_what_their_answers_have(maker: ModuleType) -> None:
    grammar = maker.Grammar(DATA, Random(0))
    known = list(maker.patterns(DATA, grammar))
    assert "say {message}" not in {pattern.text for _, pattern in known}
    for row in maker.rows([pattern for _, pattern in known], grammar, 200):
        words, (intent, *slots) = row["prompt"].split(), row["completion"].split(" ")
        assert row["prompt"].endswith("\n")
        assert not set("()[]{}<>|;") & set(row["prompt"])
        given = dict(slot.split("=", 1) for slot in slots if "=" in slot)
        if intent == "TurnOn" and "area" in given:
            assert given["domain"] == "light"
            assert given["area"].split()[0] in words
        elif intent == "TurnOn":
            assert "fan" in row["prompt"]  # names of fans alone
        elif "hue" in given:
            assert {"red": {"red", "crimson"}, "blue": {"blue"}}[given["hue"]] & set(words)
        elif int(given["value"]) < 0:
            assert words[-3:] == ["dim", "by", given["value"].removeprefix("-")]
        else:
            assert f"{given['value']}%" in words


def test_test_patterns_are_in_no_training_sentence(maker: ModuleType) -> None:
    grammar = maker.Grammar(DATA, Random(0))
    known = list(maker.patterns(DATA, grammar))
    test = [pattern.text for is_test, pattern in known if is_test]
    train = [pattern.text for is_test, pattern in known if not is_test]
    assert test == ["<light> on in {area}", "run {name}", "dim by {down:value}"]
    assert not set(test) & set(train)


def write_jobs(folder: Path) -> None:
    """Rows of a small grammar in place of the downloaded patterns."""
    rows = [
        {"prompt": f"{verb} lamp {number}\n", "completion": f"{verb} {number}"}
        for verb in ("on", "off", "dim")
        for number in range(150)
    ]
    for name, some in {"train": rows[:400], "test": rows[400:406]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def tiny_recipe(place: Path) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load((EXAMPLES / "one_job.yaml").read_text())
    fields["model"] = str(place / "model")
    data = {"sources": str(place / "train.jsonl"), "sequence_length": 32, "heldout_fraction": 0.1}
    fields["data"] = data
    distill = {"tokens": 256, "batch_tokens": 64, "eval_tokens": 128, "heldout_sequences": 2}
    sizes = iter(
        [
            {"vocab_size": 320, "num_layers": 3, "intermediate_size": 40, "multiple_of": 8},
            {"num_layers": 2, "intermediate_size": 32, "multiple_of": 8},
        ]
    )
    kept = []
    for entry in fields["stages"]:
        ((name, given),) = (entry if isinstance(entry, dict) else {entry: {}}).items()
        if name == "distill":
            given = {**given, **distill, "freeze_layers": min(1, given.get("freeze_layers", 0))}
        elif name == "profile":
            given = {**given, "samples": 8}
        elif name == "prune":
            given = next(sizes)
        elif name == "quantize":
            given = {**given, "samples": 8}
        elif name == "evaluate":
            speed = {"prefill_tokens": 8, "decode_tokens": 2, "repeats": 1}
            given = {**given, **speed, "answers": {"test": str(place / "test.jsonl")}, "limit": 4}
        elif name == "export":
            continue  # tests/test_export.py
        kept.append({name: given})
    fields["stages"] = kept
    return fields


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("one-job")
    write_model(place / "model", num_hidden_layers=4)
    write_jobs(place)
    return place


def test_the_recipe_runs(place: Path, tmp_path: Path) -> None:
    """The fine-tuned model is the teacher of all sizes, and what they are compared with."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(place), sort_keys=False))
    out = recipe.run(path, tmp_path / "out", Options(device="cpu"))
    folders = sorted(path for path in (out / "stages").iterdir() if path.is_dir())
    tuned, half, quarter = (path for path in folders if path.name.endswith("distill"))
    teachers = [(read_manifest(path) or {})["inputs"]["teacher"] for path in (tuned, half, quarter)]
    of_tuned = Checkpoint(tuned).fingerprint
    assert teachers == [Checkpoint(place / "model").fingerprint, of_tuned, of_tuned]
    assert [Checkpoint(path).config["num_hidden_layers"] for path in (tuned, half, quarter)] == [
        *(4, 3, 2)
    ]
    assert Checkpoint(half).config["vocab_size"] == 320
    (measured,) = (path for path in folders if path.name.endswith("evaluate"))
    evaluation = json.loads((measured / "evaluation.json").read_text())
    assert evaluation["teacher"] == "distilled"
    assert {"original", "distilled 3", "quantized"} <= set(evaluation["figures"])
    for figures in evaluation["figures"].values():
        by_name = {figure["name"]: figure for figure in figures}
        assert by_name["exact_answers/test"]["n"] == 4
        low, high = by_name["exact_answers/test"]["interval"]
        assert 0 <= low < high <= 1
    page = (out / "report.html").read_text()
    assert "exact answers" in page
    assert re.search(r"\d% to \d+\.\d%", page)


def test_the_recipe_of_a_hundredth_runs(place: Path, tmp_path: Path) -> None:
    """A random model with the tokens of the given one learns its answers."""
    fields: dict[str, Any] = yaml.safe_load((EXAMPLES / "one_job_hundredth.yaml").read_text())
    fields["model"] = str(place / "model")
    fields["data"] |= {"sources": str(place / "train.jsonl"), "sequence_length": 32}
    given = {name: stage for each in fields["stages"] if isinstance(each, dict)
             for name, stage in each.items()}  # fmt: skip
    given["generate"] |= {"limit": 40, "max_new_tokens": 4}
    given["generate"]["keep_unfinished"] = True  # random weights write no end
    given["distill"] |= {"tokens": 256, "batch_tokens": 64, "heldout_sequences": 2}
    given["evaluate"] |= {"answers": {"test": str(place / "test.jsonl")}, "limit": 4, "repeats": 1}
    fields["stages"] = [e for e in fields["stages"] if e == "report" or "export" not in e]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    out = recipe.run(path, tmp_path / "out", Options(device="cpu"))
    taught = Checkpoint(out / "stages" / "03-distill")
    assert taught.config["hidden_size"] == 128 and taught.config["num_hidden_layers"] == 6
    manifest = read_manifest(taught.folder) or {}
    rows = (out / "stages" / "02-generate" / "answers.jsonl").read_text().splitlines()
    assert 20 < len(rows) <= 40  # equal answers are left out
    assert "answers" in manifest["inputs"]
    evaluation = json.loads((out / "stages" / "05-evaluate" / "evaluation.json").read_text())
    assert {"teacher", "distilled", "quantized"} <= set(evaluation["figures"])


def test_a_criterion_that_the_profile_lacks_is_told_at_once(place: Path, tmp_path: Path) -> None:
    fields = tiny_recipe(place)
    fields["stages"][1]["profile"]["criteria"] = ["activation_l2", "block_influence"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(UserError, match=r"stages\.2\.prune: vocab_size is chosen by token_count"):
        recipe.run(path, tmp_path / "out", Options(device="cpu"))
    assert not (tmp_path / "out" / "stages").exists()


def test_comparing_with_the_model_before_a_prune_needs_one(place: Path, tmp_path: Path) -> None:
    fields = tiny_recipe(place)
    fields["stages"] = [each for each in fields["stages"] if "evaluate" in each]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(UserError, match="there is no prune before it"):
        recipe.run(path, tmp_path / "out", Options(device="cpu"))
