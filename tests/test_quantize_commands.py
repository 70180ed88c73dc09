"""Quantization by the command line and in recipes: what is said, and the order of stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import DISTILL, EVALUATE, PROFILE, PRUNE, Refused, call, recipe_fields, write_recipe
from transformers import AutoModelForCausalLM

from regrow import stage_dir
from regrow.config import Options
from regrow.errors import UserError
from regrow.recipe.recipe import Recipe, check, read, run

QUANTIZE: dict[str, Any] = {"quantize": {"scheme": "int4-g32", "samples": 16}}


def recipe_of(place: Path, *stages: Any) -> Recipe:
    return Recipe.model_validate(recipe_fields(place / "model", place / "text.jsonl", *stages))


def test_the_quantize_command_writes_figures(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", place / "model", "--out", out, "--scheme", "int8", "--samples", 16]
    arguments += ["--data", place / "text.jsonl", "--sequence-length", 32]
    call(*arguments, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "quantize: 21 layers"
    assert lines[1].startswith("  21 layers in int8 by rtn: ") and lines[1].endswith(" kB")
    assert "  int8: vLLM has no kernel for it on a CPU" in "\n".join(lines)
    assert not out.exists()
    call(*arguments)
    output = capsys.readouterr()
    assert "Applying quantization" not in output.err
    figures = {f["name"]: f["value"] for f in (stage_dir.read(out) or {})["figures"]}
    for name in ("bytes", "bits per parameter", "perplexity", "kl", "times smaller"):
        assert f"  {name} " in output.out
        assert figures[name] > 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_the_other_stages_refuse_it(place: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    call("quantize", place / "model", "--out", out, "--method", "rtn")
    text = ["--data", place / "text.jsonl", "--sequence-length", 32]
    expected = f"{out} is quantized (compressed-tensors): prune first and quantize last"
    for arguments in (
        ["prune", out, "--profile", place / "profile", "--intermediate-size", 40],
        ["profile", out, *text],
        ["distill", out, "--teacher", place / "model", *text],
        ["quantize", out, "--method", "rtn"],
    ):
        assert expected in refused(*arguments, "--out", tmp_path / "x")
    assert expected in refused("inspect", out)
    call("evaluate", out, *text, "--metrics", "size", "--out", tmp_path / "e")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scheme", "int3"], "no scheme named 'int3'"),
        (["--method", "gtpq"], "no method named 'gtpq' — did you mean 'gptq'?; there are: gptq"),
        (["--keep", "("], "'(' is not a regular expression"),
        (["--rules", "q_proj", "int5"], "no scheme named 'int5'"),
        (["--method", "rtn", "--rules", "w9", "int8"], "rules: 'w9' matches no module"),
        (["--method", "gptq"], "gptq calibrates on text: give data, or use the method rtn"),
        (["--samples", "3"], "--samples"),
    ],
)
def test_bad_flags_are_refused_in_one_line(
    flags: list[str], message: str, place: Path, untouched: Path, refused: Refused
) -> None:
    assert message in refused("quantize", place / "model", "--out", untouched, *flags)


def test_a_recipe_ends_with_a_quantized_model(place: Path, tmp_path: Path) -> None:
    out = run(
        recipe_of(place, PROFILE, PRUNE, DISTILL, QUANTIZE, EVALUATE, "report"), tmp_path / "run"
    )
    model_config = json.loads((out / "model" / "config.json").read_text())
    assert model_config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.intermediate_size == 40
    evaluation = json.loads((out / "stages" / "05-evaluate" / "evaluation.json").read_text())
    assert evaluation["labels"] == ["teacher", "pruned", "repaired", "distilled", "quantized"]
    assert "quantized" in (out / "report.html").read_text()
    figures = {f["name"]: f["value"] for f in (stage_dir.read(out / "model") or {})["figures"]}
    assert figures["times smaller than the first"] > figures["times smaller"] > 1


@pytest.mark.parametrize("later", [PROFILE, DISTILL, QUANTIZE], ids=" ".join)
def test_a_stage_that_changes_weights_after_quantize_is_refused(
    later: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """Nothing that changes weights comes after quantization, unless it wrote plain weights."""
    (name,) = later
    recipe = recipe_of(place, QUANTIZE, later)
    with pytest.raises(UserError) as caught:
        run(recipe, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(f"stages.1.{name}: comes after stages.0.quantize")
    assert message.endswith("or set stages.0.quantize.dequantize: true")
    assert not (tmp_path / "run").exists()
    insisted = {"quantize": {**QUANTIZE["quantize"], "dequantize": True}}
    check(recipe_of(place, insisted, later), Options())


def test_a_dequantized_model_can_be_trained_and_quantized_again(
    place: Path, tmp_path: Path
) -> None:
    """Rounded weights as a plain checkpoint, trained on, then rounded again."""
    insisted = {"quantize": {**QUANTIZE["quantize"], "dequantize": True}}
    out = run(recipe_of(place, insisted, DISTILL, QUANTIZE), tmp_path / "run")
    first = out / "stages" / "01-quantize"
    assert "quantization_config" not in json.loads((first / "config.json").read_text())
    assert "quantization_config" in json.loads((out / "model" / "config.json").read_text())


def test_a_recipe_trains_for_the_grid_before_quantizing(place: Path, tmp_path: Path) -> None:
    aware = {"distill": {**DISTILL["distill"], "fake_quantize": "int4-g32"}}
    rounded = {"quantize": {"scheme": "int4-g32", "method": "rtn", "samples": 16}}
    out = run(recipe_of(place, aware, rounded), tmp_path / "run")
    figures = {f["name"]: f["value"] for f in (stage_dir.read(out / "model") or {})["figures"]}
    assert figures["times smaller"] > 2  # float32 masters


def test_bad_recipes_are_refused(place: Path, tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path / "r.yaml",
        recipe_fields(place / "model", place / "text.jsonl", {"quantize": {"scheme": "int9"}}),
    )
    with pytest.raises(UserError, match=r"stages\.0\.quantize\.scheme: no scheme named 'int9'"):
        read(path)
    recipe = recipe_of(place, {"quantize": {"rules": {"nothing": "int8"}}})
    with pytest.raises(UserError, match=r"stages\.0\.quantize: rules: 'nothing' matches no module"):
        run(recipe, tmp_path / "run")
