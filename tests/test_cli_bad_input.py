"""Bad input through the command line: exit 2, one clear line, nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_folders import set_config
from tiny_job import (
    COMMANDS,
    LENGTH,
    PROFILE,
    Refused,
    command,
    recipe_fields,
    write_recipe,
    write_text,
)

BLEND = ["--sequence-length", str(LENGTH)]


def no_folder(model: Path) -> None:
    shutil.rmtree(model)


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def unknown_family(model: Path) -> None:
    set_config(model, model_type="lama")


def truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def corrupt(model: Path) -> None:
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[8:40] = b"\xff" * 32
    weights.write_bytes(content)


def no_tokenizer(model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (no_folder, "no such model folder"),
    "no config": (no_config, "no config.json in"),
    "unknown family": (
        unknown_family,
        "no family named 'lama' — did you mean 'llama'?; there are: gemma3_text, llama, mistral, "
        "mixtral, phi3, qwen2, qwen3, qwen3_moe; to add one, read docs/add-a-family.md",
    ),
    "truncated": (truncated, "model.safetensors is truncated or no safetensors file"),
    "corrupt": (corrupt, "model.safetensors is truncated or no safetensors file"),
    "no tokenizer": (no_tokenizer, "no tokenizer in"),
}


NEEDS_NO_TOKENIZER = ("inspect", "prune")
BROKEN_FOR = [
    (kind, name)
    for kind in BROKEN
    for name in ("inspect", *COMMANDS)
    if kind != "no tokenizer" or name not in NEEDS_NO_TOKENIZER
]


@pytest.mark.parametrize(("kind", "name"), BROKEN_FOR)
def test_a_bad_model_is_refused(
    kind: str, name: str, place: Path, untouched: Path, refused: Refused
) -> None:
    spoil, expected = BROKEN[kind]
    spoil(place / "model")
    at_once = name != "evaluate"  # it says first which models it opens
    arguments = command(name, place, place / "model", untouched)
    assert expected in refused(*arguments, at_once=at_once)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("name", ["profile", "distill", "evaluate"])
def test_bad_text_is_refused(
    name: str, rows: int, place: Path, untouched: Path, refused: Refused
) -> None:
    """None at all, and three documents of which none is held out or for calibration."""
    write_text(place / "text.jsonl", rows, seed=1)
    message = refused(*command(name, place, place / "model", untouched), at_once=False)
    assert message.startswith("too little text: the ")
    assert "add text" in message


def test_too_little_text_for_gram_matrices_is_refused(
    place: Path, untouched: Path, refused: Refused
) -> None:
    """Some sequences, but none left to choose the ridge strength on."""
    write_text(place / "text.jsonl", 10)
    message = refused(*command("profile", place, place / "model", untouched), at_once=False)
    assert "sequences for the Gram matrices are too few" in message


def test_too_little_text_for_a_search_is_refused(
    place: Path, untouched: Path, refused: Refused
) -> None:
    """The profile would take all there is; the shape must be chosen on text beyond that."""
    write_text(place / "text.jsonl", 60)
    prune = {"prune": {"keep_params": 0.8, "multiple_of": 4}}
    fields = recipe_fields(place / "model", place / "text.jsonl", PROFILE, prune)
    write_recipe(place / "recipe.yaml", fields)
    message = refused("run", place / "recipe.yaml", "--out", untouched, at_once=False)
    assert "too little calibration text" in message


@pytest.mark.parametrize("rows", [0, 3])
def test_bad_text_in_a_recipe_is_refused(
    rows: int, place: Path, untouched: Path, refused: Refused
) -> None:
    write_text(place / "text.jsonl", rows, seed=1)
    arguments = command("run", place, place / "model", untouched)
    assert "too little" in refused(*arguments, at_once=False)


UNKNOWN_KEYS = {
    "dta": (["dta=1"], "dta: unknown key — did you mean 'data'?"),
    "data.seqence_length": (["data.seqence_length=8"], "did you mean 'sequence_length'?"),
    "a source's": (["data.sources=[{source: a.txt, wight: 2}]"], "did you mean 'weight'?"),
    "a stage's": (
        ["stages.prune.keep_parms=0.5"],
        "stages.1.prune.keep_parms: unknown key — did you mean 'keep_params'?",
    ),
    "a stage": (["stages=[profile, prun]"], "no stage named 'prun' — did you mean 'prune'?"),
    "no key": (["keep_params"], "--set keep_params: write key=value"),
    "no place": (["stages.finetune.tokens=3"], "the recipe has no 'finetune' there"),
    "no YAML": (["data.seed=["], "'[' is no YAML value"),
    "two stages in one": (["stages=[{profile: {}, prune: {}}]"], "one stage per entry"),
}


@pytest.mark.parametrize("kind", UNKNOWN_KEYS)
def test_a_bad_recipe_key_is_refused(
    kind: str, place: Path, untouched: Path, refused: Refused
) -> None:
    changes, expected = UNKNOWN_KEYS[kind]
    flags = [part for change in changes for part in ("--set", change)]
    assert expected in refused(*command("run", place, place / "model", untouched), *flags)


@pytest.mark.parametrize("text", ["model: [", "- profile", "", "model: x\n"])
def test_a_missing_recipe_is_refused(
    text: str, place: Path, untouched: Path, refused: Refused
) -> None:
    (place / "recipe.yaml").write_text(text)
    refused("run", place / "recipe.yaml", "--out", untouched)
    assert "no such recipe" in refused("run", place / "none.yaml", "--out", untouched)


TARGETS: dict[str, tuple[dict[str, Any], str]] = {
    "heads and groups": (
        {"num_attention_heads": 3},
        "num_attention_heads 3 with 2 key/value heads: each of those has the same number of query "
        "heads, at most 3; allowed: 4, 6",
    ),
    "more layers": ({"num_layers": 4}, "num_hidden_layers 4: allowed are 1 to 3"),
    "multiple": ({"intermediate_size": 40, "multiple_of": 32}, "must be a multiple of 32; use 32"),
    "share": ({"keep_params": 0.02}, "keep_params 0.02: no shape with widths that are multiples"),
    "multiple and share": ({"keep_params": 0.83, "multiple_of": 64}, "keep_params 0.83: no shape"),
    "nothing": ({}, "no target to prune to"),
    "the same size": (
        {"num_layers": 3},
        "num_layers 3: the model has that already, so nothing is cut; give less",
    ),
    "two targets": ({"keep_params": 0.8, "num_layers": 2}, "keep_params, or sizes"),
    "no plan": ({"plan": "nowhere.json"}, "no plan at nowhere.json"),
    "share over one": ({"keep_params": 1.5}, "less than 1 (given: 1.5)"),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_bad_target_is_refused(kind: str, place: Path, untouched: Path, refused: Refused) -> None:
    """Refused by the stage's command, by its dry run, and by a recipe before its first stage."""
    fields, expected = TARGETS[kind]
    flags = [str(p) for k, v in fields.items() for p in (f"--{k.replace('_', '-')}", v)]
    prune = ["prune", place / "model", "--profile", place / "profile", "--out", untouched, *flags]
    assert expected in refused(*prune, "--data", place / "text.jsonl", *BLEND)
    assert expected in refused(*prune, "--dry-run")
    recipe = recipe_fields(place / "model", place / "text.jsonl", PROFILE, {"prune": fields})
    write_recipe(place / "recipe.yaml", recipe)
    assert expected in refused("run", place / "recipe.yaml", "--out", untouched)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "inspect"])
def test_a_batch_of_no_sequences_is_refused(
    name: str, place: Path, untouched: Path, refused: Refused
) -> None:
    given = command(name, place, place / "model", untouched)
    for size in (0, -1):
        assert "--batch-size: " in refused(*given, "--batch-size", size)


@pytest.mark.parametrize("name", ["profile", "distill", "prune"])
def test_sequences_beyond_the_models_positions_are_refused(
    name: str, place: Path, untouched: Path, refused: Refused
) -> None:
    given = ["prune", place / "model", "--profile", place / "profile", "--out", untouched]
    given += ["--keep-params", 0.8, "--multiple-of", 4, "--data", place / "text.jsonl"]
    if name != "prune":
        given = [*command(name, place, place / "model", untouched)]
    given += ["--batch-tokens", 4096] if name == "distill" else []
    told = refused(*given, "--sequence-length", 4096, at_once=False)
    assert "sequence_length 4096 is longer than" in told and "positions): set it to" in told


def test_allow_sibling_without_a_plan_is_refused(
    place: Path, untouched: Path, refused: Refused
) -> None:
    prune = ["prune", place / "model", "--profile", place / "profile", "--num-layers", 2]
    message = refused(*prune, "--out", untouched, "--allow-sibling")
    assert "--allow-sibling: it only applies to a plan from a file" in message
    step = {"prune": {"num_layers": 2, "allow_sibling": True}}
    write_recipe(
        place / "recipe.yaml", recipe_fields(place / "model", place / "text.jsonl", PROFILE, step)
    )
    message = refused("run", place / "recipe.yaml", "--out", untouched)
    assert "prune.allow_sibling: it only applies to a plan" in message


def test_a_second_cut_to_more_layers_than_are_left_is_refused(
    place: Path, untouched: Path, refused: Refused
) -> None:
    """The second cut starts from what the first leaves, and that is known before any work."""
    first, second = {"prune": {"num_layers": 2}}, {"prune": {"num_layers": 3}}
    fields = recipe_fields(place / "model", place / "text.jsonl", PROFILE, first, PROFILE, second)
    write_recipe(place / "recipe.yaml", fields)
    message = refused("run", place / "recipe.yaml", "--out", untouched)
    assert "stages.3.prune: num_hidden_layers 3: allowed are 1 to 2" in message


def test_a_prune_before_its_profile_is_refused(
    place: Path, untouched: Path, refused: Refused
) -> None:
    fields = recipe_fields(place / "model", place / "text.jsonl", {"prune": {"num_layers": 2}})
    write_recipe(place / "recipe.yaml", fields)
    message = refused("run", place / "recipe.yaml", "--out", untouched)
    assert "stages.0.prune: put a profile stage" in message


def test_a_bad_task_is_refused(place: Path, untouched: Path, refused: Refused) -> None:
    """Rows are checked by the command, by its dry run, and by a recipe before its first stage."""
    (place / "mine.jsonl").write_text('{"prompt": "x"}\n')
    tasks = [str(place / "mine.jsonl")]
    expected = "mine.jsonl:1: the row has prompt; it needs `context` + `choices` + `gold`, or"
    evaluate = command("evaluate", place, place / "model", untouched)
    assert expected in refused(*evaluate, "--tasks", *tasks, at_once=False)
    assert expected in refused(*evaluate, "--tasks", *tasks, "--dry-run")
    fields = recipe_fields(place / "model", place / "text.jsonl", {"evaluate": {"tasks": tasks}})
    write_recipe(place / "recipe.yaml", fields)
    assert f"stages.0.evaluate: {place}" in refused(
        "run", place / "recipe.yaml", "--out", untouched
    )


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_report_as_first_stage_is_refused(
    flags: list[str], place: Path, untouched: Path, refused: Refused
) -> None:
    recipe = write_recipe(
        place / "recipe.yaml", recipe_fields(place / "model", place / "text.jsonl", {"report": {}})
    )
    message = refused("run", recipe, "--out", untouched, *flags)
    assert message.startswith("stages.0.report: nothing to report on: put it after the stages")


WRONG_FLAGS: dict[str, tuple[list[object], str]] = {
    "no source": (["--data"], "--data: the list is empty"),
    "a weight": (["--data-weights", -1], "--data-weights: Input should be greater than 0"),
    "a length": (["--sequence-length", 4], "--sequence-length: Input should be greater than"),
}


@pytest.mark.parametrize("kind", WRONG_FLAGS)
def test_errors_name_the_flag(kind: str, place: Path, untouched: Path, refused: Refused) -> None:
    flags, expected = WRONG_FLAGS[kind]
    given = command("profile", place, place / "model", untouched)
    assert refused(*given, *flags).startswith(expected)


def test_errors_of_lists_and_weights_name_the_flag(
    place: Path, untouched: Path, refused: Refused
) -> None:
    evaluate = command("evaluate", place, place / "model", untouched)
    told = refused(*evaluate, "--prefill-tokens", 0)
    assert told.startswith("--prefill-tokens: Input should be greater than")
    told = refused(*evaluate, "--texts", "a", "nofile.txt", "--window", 64, at_once=False)
    assert told.startswith("nofile.txt: no such file or folder; check the path")
    assert "`data`" not in told


def test_a_dry_run_refuses_a_folder_with_other_files(place: Path, refused: Refused) -> None:
    (place / "out").mkdir()
    (place / "out" / "mine").write_text("mine")
    given = command("run", place, place / "model", place / "out")
    assert "has files that are not from regrow" in refused(*given, "--dry-run")
