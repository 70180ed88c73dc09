"""The command line: each command's good path on a tiny model, and its exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import LENGTH, call, command, recipe_fields, write_model, write_recipe, write_text
from tiny_models import tiny_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

import regrow
from regrow.cli.main import main
from regrow.errors import UserError

SMALL = ["--intermediate-size", "40", "--multiple-of", "8"]
QUICK = ["--heldout-sequences", "4", "--new-tokens", "4", "--prefill-tokens", "16"]
QUICK += ["--decode-tokens", "2", "--repeats", "1"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every command in turn: model → profile → student → taught → evaluation."""
    place = tmp_path_factory.mktemp("cli")
    model = write_model(place / "model")
    data = ["--data", write_text(place / "text.jsonl"), "--sequence-length", LENGTH]
    profile, student, taught = place / "profile", place / "student", place / "taught"
    call("profile", model, *data, "--samples", 16, "--gram-tokens", 512, "--out", profile)
    call("prune", model, "--profile", profile, *SMALL, "--out", student)
    share = ["--keep-params", 0.8, "--multiple-of", 4]
    call("prune", model, "--profile", profile, *data, *share, "--out", place / "searched")
    budget = ["--tokens", 1280, "--batch-tokens", 128, "--eval-tokens", 256]
    budget += ["--heldout-sequences", 16, "--learning-rate", 3e-4]
    call("distill", student, "--teacher", model, *data, *budget, "--out", taught)
    models = [f"pruned={student}", f"distilled={taught}"]
    call("evaluate", *models, "--against", model, *data, *QUICK, "--out", place / "evaluation")
    return place


def test_the_profile_command_writes_a_profile(place: Path) -> None:
    info = read(place / "profile" / "profile.json")
    assert (info["samples"], info["tokens"], info["gram_tokens"]) == (16, 16 * LENGTH, 512)
    assert len(list((place / "profile" / "grams").iterdir())) == 2 * 3


def test_the_prune_command_writes_a_smaller_model(place: Path) -> None:
    """The stock reader opens it; the plan is of the size asked for and the parent's."""
    student = AutoModelForCausalLM.from_pretrained(place / "student")
    assert student.config.intermediate_size == 40
    assert student.lm_head.weight is student.model.embed_tokens.weight
    plan = read(place / "student" / "plan.json")
    assert plan["fingerprint"] == regrow.load(place / "model").fingerprint
    kept = plan["mlp"]["0"]
    parent = AutoModelForCausalLM.from_pretrained(place / "model")
    gates = (m.model.layers[0].mlp.gate_proj.weight for m in (student, parent))
    small, large = gates
    assert torch.equal(small, large[kept])


def test_the_prune_command_searches_for_a_shape(place: Path) -> None:
    """Of several shapes of the share asked for, the one of the lowest KL was cut."""
    table = read(place / "searched" / "candidates.json")
    assert len(table) > 1
    assert all(abs(row["keep"] - 0.8) <= 0.01 for row in table)
    (chosen,) = [row for row in table if row["chosen"]]
    assert chosen["kl"] == min(row["kl"] for row in table)
    assert read(place / "searched" / "plan.json")["after"]["mlp"] == chosen["sizes"]["mlp"]
    student = AutoModelForCausalLM.from_pretrained(place / "searched")
    assert sum(weight.numel() for weight in student.parameters()) == chosen["parameters"]


@torch.no_grad()
def test_the_distill_command_trains_a_student(place: Path) -> None:
    """Nearer to the teacher than before; what was written is what was measured."""
    lines = (place / "taught" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    kl = {row["step"]: row["heldout_kl"] for row in rows if "heldout_kl" in row}
    assert list(kl) == [0, 2, 4, 6, 8, 10]
    assert kl[10] < 0.95 * kl[0]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    figures = {row["name"]: row["value"] for row in read(place / "taught/manifest.json")["figures"]}
    assert figures == {
        "held-out KL before": kl[0],
        "held-out KL": min(kl.values()),
        "training tokens": 1280,
        "training tokens of the kept student": 128 * min(list(kl)[1:], key=lambda step: kl[step]),
    }
    models = [AutoModelForCausalLM.from_pretrained(place / n) for n in ("student", "taught")]
    assert models[1].dtype == torch.bfloat16
    assert not torch.equal(*(model(tiny_ids()).logits for model in models))
    assert read(place / "taught" / "plan.json") == read(place / "student" / "plan.json")


def test_losses_by_name_and_weight(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command("distill", place, place / "student", tmp_path / "out")
    weights = ["--losses", "reverse_kl", 1, "cross_entropy", 0.1]
    call(*arguments, "--dry-run", *weights)
    for losses, message in {
        ("revers_kl", 1): "--losses: no loss named 'revers_kl' — did you mean 'reverse_kl'?",
        ("jsd", 0): "--losses: the weight of jsd must be above 0",
        ("jsd",): "give each name once, and a weight after it",
        ("jsd", 1, "jsd", 2): "give each name once, and a weight after it",
    }.items():
        capsys.readouterr()
        with contextlib.suppress(SystemExit):  # of the parser, with the same exit code
            assert main([str(part) for part in (*arguments, "--losses", *losses)]) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    assert "--losses NAME WEIGHT [NAME WEIGHT ...]" in capsys.readouterr().out


def test_distill_a_fresh_student(place: Path, tmp_path: Path) -> None:
    """A config.json alone: sizes in a dry run, then a model of these sizes."""
    config = read(place / "model" / "config.json")
    (tmp_path / "fresh.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    arguments = command("distill", place, place / "model", tmp_path / "out")
    arguments[1] = tmp_path / "fresh.json"
    call(*arguments, "--dry-run")
    assert not (tmp_path / "out").exists()
    call(*arguments)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 1


def test_the_evaluate_command_writes_figures(place: Path) -> None:
    evaluation = read(place / "evaluation" / "evaluation.json")
    assert evaluation["labels"] == ["teacher", "pruned", "distilled"]
    kl: dict[str, float] = {
        label: figure["value"]
        for label, figures in evaluation["figures"].items()
        for figure in figures
        if figure["name"] == "kl/heldout"
    }
    assert "teacher" not in kl
    assert 0 < kl["distilled"] < kl["pruned"]


@pytest.mark.parametrize("name", ["student", "searched", "taught"])
def test_outputs_stand_alone(name: str, place: Path) -> None:
    """Tokenizer and chat template came along; text goes in and text comes out."""
    tokenizer = AutoTokenizer.from_pretrained(place / name)
    parent = AutoTokenizer.from_pretrained(place / "model")
    assert tokenizer.get_vocab() == parent.get_vocab()
    assert tokenizer.chat_template == parent.chat_template
    model: Any = AutoModelForCausalLM.from_pretrained(place / name)
    ids = tokenizer("The quick brown", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape[1] == ids.shape[1] + 3


def test_a_command_run_again_finds_its_work_complete(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command finds its work done."""
    before = (place / "student" / "manifest.json").stat().st_mtime_ns
    call(
        "prune", place / "model", "--profile", place / "profile", *SMALL, "--out", place / "student"
    )
    assert "student is complete and unchanged" in capsys.readouterr().err
    assert (place / "student" / "manifest.json").stat().st_mtime_ns == before


def test_a_recipe_runs_and_is_reported(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = recipe_fields(place / "model", place / "text.jsonl")
    fields["stages"].append("report")
    recipe = write_recipe(tmp_path / "recipe.yaml", fields)
    out = tmp_path / "run"
    call("run", recipe, "--out", out, "--set", "stages.distill.tokens=512")
    names = {"stages", "model", "report.html", "metrics.jsonl", "recipe.yaml"}
    assert {path.name for path in out.iterdir()} == names
    stages = ["01-profile", "02-prune", "02-prune-repaired", "03-distill", "04-evaluate"]
    assert sorted(path.name for path in (out / "stages").iterdir()) == stages
    assert "distill: 512 tokens" in capsys.readouterr().err
    call("report", out, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    call("watch", out)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown if "✓ done" in line] == [
        *("01-profile", "02-prune", "03-distill", "04-evaluate", "05-report")
    ]
    assert shown[-1] == "complete"


def test_an_interrupt_ends_with_one_line_and_exit_code_130(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("regrow.pruning.prune.cut_folder", stop)
    prune = ["prune", place / "model", "--profile", place / "profile", *SMALL]
    assert main([str(part) for part in (*prune, "--out", tmp_path / "out")]) == 130
    assert "regrow: stopped; the same command begins anew" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial").mkdir()
    monkeypatch.setattr("regrow.stage_dir.StageDir.__enter__", stop)
    assert main([*map(str, prune), f"--out={tmp_path / 'out'}"]) == 130
    assert "regrow: stopped; the same command continues from here" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RecursionError, ModuleNotFoundError, UserError, None])
def test_an_interrupt_that_an_import_turns_into_another_error(
    error: type[Exception] | None,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def swallow(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if error is not None:
                raise error("of an import") from None
            raise

    monkeypatch.setattr("regrow.cli.inspect_model.describe_model", swallow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background
    try:
        assert main(["inspect", str(place / "model")]) == 130
        assert capsys.readouterr().err == "\nregrow: stopped\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_assertion_error_keeps_its_traceback(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("regrow.cli.inspect_model.describe_model", broken)
    with pytest.raises(AssertionError, match="ours"):
        main(["inspect", str(place / "model")])


def test_a_folder_without_write_permission_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    prune = ["prune", place / "model", "--profile", place / "profile", *SMALL]
    assert main([str(part) for part in (*prune, "--out", place / "new")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("regrow: error: ")
    assert "Permission denied; give a place that can be written to" in last


def test_python_m_regrow_prints_one_line_for_an_error(tmp_path: Path) -> None:
    """In a process of its own: exit code, one line, nothing of other libraries."""
    script = [sys.executable, "-m", "regrow"]
    done = subprocess.run([*script, "inspect", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"regrow: error: no config.json in {tmp_path}: give a Hugging Face model folder\n"
    )
    done = subprocess.run([*script, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"regrow {regrow.__version__}\n")


def test_only_our_own_lines_are_printed(place: Path, tmp_path: Path) -> None:
    """Only our own lines on stderr, also where transformers has bars and advice."""
    shutil.copytree(place / "student", tmp_path / "student")
    data = ["--data", place / "text.jsonl", "--sequence-length", LENGTH]
    budget = [
        "--tokens",
        256,
        "--batch-tokens",
        128,
        "--eval-tokens",
        128,
        "--heldout-sequences",
        2,
    ]
    arguments = ["distill", tmp_path / "student", "--teacher", place / "model", *data, *budget]
    script = [sys.executable, "-m", "regrow", *arguments, "--out", tmp_path / "taught"]
    done = subprocess.run([str(part) for part in script], capture_output=True, text=True)
    assert done.returncode == 0
    assert {line.split(":")[0] for line in done.stderr.splitlines()} == {"distill"}
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["inspect", "profile"])
def test_a_closed_pipe_gives_no_traceback(place: Path, name: str) -> None:
    """As in `regrow inspect MODEL | head -1`; here the reader is gone before anything is said."""
    read, write = os.pipe()
    os.close(read)
    script = [sys.executable, "-m", "regrow", name, place / "model"]
    if name == "profile":
        script += ["--data", place / "text.jsonl", "--out", place / "none", "--dry-run"]
    done = subprocess.run(list(map(str, script)), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""
