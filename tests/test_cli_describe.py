"""What the command line prints: dry runs, `inspect`, help, and advice on mistyped names."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from tiny_job import LENGTH, call, command, recipe_fields, write_job, write_model, write_recipe
from transformers import AutoModelForCausalLM

from regrow.cli.main import commands, main
from regrow.cost.units import size_text

SMALL = ["--intermediate-size", "40", "--multiple-of", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, text, its profile, and a student."""
    place = write_job(tmp_path_factory.mktemp("describe"))
    call(*command("prune", place, place / "model", place / "student"))
    return place


def test_dry_runs_describe_the_work_and_write_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each says what would happen, with sizes and time, and writes nothing."""
    model, data = place / "model", ["--data", place / "text.jsonl", "--sequence-length", LENGTH]
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_fields(model, place / "text.jsonl"))
    before = sorted(tmp_path.rglob("*"))
    dry = ["--out", tmp_path / "out", "--dry-run"]
    budget = ["--tokens", 1280, "--batch-tokens", 128]

    def output_of(*arguments: object) -> str:
        call(*arguments, *dry)
        return capsys.readouterr().out

    profile = output_of("profile", model, *data, "--samples", 16)
    assert "16 sequences of 32 = 512 tokens" in profile
    assert re.search(r"= 512 tokens, time about 0:0\d", profile)
    prune = output_of("prune", model, *SMALL)
    parameters = sum(w.numel() for w in AutoModelForCausalLM.from_pretrained(model).parameters())
    after = parameters - 3 * 16 * 3 * 48
    assert f"prune: {parameters:,} parameters now" in prune
    assert (
        f"{after:,} ({after / parameters:.1%})  {2 * after / 1e6:,.1f} MB  {{'mlp': 40}}" in prune
    )
    search = output_of("prune", model, "--keep-params", 0.8, "--multiple-of", 4)
    assert "one of" in search
    assert "mlp + kv_heads" in search
    distill = output_of("distill", place / "student", "--teacher", model, *data, *budget)
    assert "10 steps of 128 tokens (1 micro-batches of 4 sequences)" in distill
    assert "time at best 0:0" in distill
    evaluate = output_of(
        "evaluate", model, f"b={place / 'student'}", *data, "--heldout-sequences", 4
    )
    assert "on 128 tokens" in evaluate
    assert f"b: {after:,} parameters, {size_text(2 * after)}, about 0:0" in evaluate
    job = output_of("run", recipe)
    assert [line.split(":")[0] for line in job.splitlines() if line[0] != " "] == [
        *("profile", "prune", "distill", "evaluate")
    ]
    assert "report: of " in output_of("report", place)
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_prints_the_sizes_of_a_model(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("inspect", place / "model")
    output = capsys.readouterr().out
    assert "family llama" in output
    assert "(tied" in output
    assert re.search(r"layers +│ 3 +│ 1, 2, 3 +│ --num-layers", output)
    assert re.search(r"mlp +│ 56 +│ 32, 56 +│ --intermediate-size", output)
    assert re.search(r"heads +│ 6 +│ 2, 4, 6 +│ --num-attention-heads", output)
    assert re.search(r"kv_heads +│ 2 +│ 1, 2 +│ --num-key-value-heads", output)
    assert "80%" in output


def test_inspect_names_sizes_at_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table's parameters are those of models of these sizes."""
    write_model(tmp_path / "m", intermediate_size=512, num_hidden_layers=4)
    call("inspect", tmp_path / "m")
    rows = re.findall(
        r"│ 50% +│ mlp +│ ([\d,]+) \(([\d.]+)%\) │ mlp (\d+)", capsys.readouterr().out
    )
    ((parameters, share, width),) = rows
    mixture = write_model(
        tmp_path / "n", intermediate_size=int(width), num_hidden_layers=4, head_dim=8
    )
    model = AutoModelForCausalLM.from_pretrained(mixture)
    assert sum(weight.numel() for weight in model.parameters()) == int(parameters.replace(",", ""))
    assert 49 <= float(share) <= 51


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distil", "model", "--out", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("regrow: error: no command named 'distil' — did you mean 'distill'?")


def test_a_command_may_be_written_with_a_hyphen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["learn-masks", "--help"])
    assert capsys.readouterr().out.startswith("usage: regrow learn_masks")


def test_a_flag_without_a_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--no-such-flag"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("regrow: error: --no-such-flag: name the command first; there are: run,")


@pytest.mark.parametrize("name", commands())
def test_an_unknown_flag_is_refused_with_the_nearest(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "x", "--no-such-flag", "3"])
    assert stop.value.code == 2
    assert "--no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize("name", commands())
def test_help_explains_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag's help is there: of arguments from the docstring, of fields from theirs."""
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    help_text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    summary = str(commands()[name].__doc__).splitlines()[0]
    assert summary in help_text
    if name == "prune":
        assert "Changed widths are multiples of this" in help_text


def test_models_can_be_given_names(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NAME=MODEL names a model and a teacher; a folder whose own name has a `=` stays whole."""
    with_sign = Path(shutil.copytree(place / "student", tmp_path / "keep=0.8"))
    model, out = place / "model", tmp_path / "out"
    measured = ["evaluate", with_sign, "--data", place / "text.jsonl", "--out", out, "--dry-run"]
    call(*measured, "--against", f"big={model}")
    output = capsys.readouterr().out
    labels = re.findall(r"^  ([^ ].*?): .* parameters", output, re.MULTILINE)
    assert labels[:2] == ["big", "keep=0.8"]
    call(*measured, "--against", with_sign)
    assert "  keep=0.8: " in capsys.readouterr().out
    assert main([str(part) for part in [*measured, "--against", "=x"]]) == 2
    assert "=x: write NAME=MODEL" in capsys.readouterr().err
