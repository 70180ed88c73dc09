"""Outputs that cannot be, by the command line: a folder in use, a full disk, a loss of NaN."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_job import COMMANDS, Refused, call, command
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrow.checkpoint import shards
from regrow.training.trainer import DistillTrainer


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "holds", ["notes", "a foreign manifest", "another stage", "a file", "under"]
)
def test_an_output_folder_with_other_files_is_refused(
    name: str, holds: str, place: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "out"
    if holds in ("a file", "under"):
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    if holds == "a foreign manifest":
        (out / "manifest.json").write_text('{"name": "a browser extension"}')
    if holds == "another stage":
        manifest = {"stage": "export", "digest": "0", "config": {}, "inputs": {}}
        (out / "manifest.json").write_text(json.dumps(manifest))
    target = out / "model" if holds == "under" else out
    message = refused(*command(name, place, place / "model", target), at_once=False)
    expected = {"a file": "is a file", "under": "is a file", "another stage": "result of export"}
    assert expected.get(holds, "has files that are not from regrow") in message
    assert (out if out.is_file() else out / "mine").read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [place, out]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_named_pipe_as_output_is_refused(
    name: str, place: Path, tmp_path: Path, refused: Refused
) -> None:
    """Opening it would wait for ever for another process."""
    out = tmp_path / "out"
    os.mkfifo(out)
    message = refused(*command(name, place, place / "model", out), at_once=False)
    assert message == f"{out} is a named pipe: give --out a folder that is new or empty"
    assert out.is_fifo()
    assert sorted(tmp_path.iterdir()) == [place, out]


def test_a_link_as_output_is_followed(place: Path, tmp_path: Path) -> None:
    """It stays, and what it leads to has the result."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    call(*command("prune", place, place / "model", tmp_path / "out"))
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "in", "out"]


@pytest.mark.parametrize("name", ["profile", "prune", "cache", "distill"])
def test_too_little_disk_space_is_refused_before_the_work(
    name: str, place: Path, untouched: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = refused(*command(name, place, place / "model", untouched))
    assert message.startswith(f"no disk space for {untouched}: ")
    assert "and 0.00 GB free; free some or give --out another disk" in message


@pytest.mark.parametrize("name", ["profile", "prune"])
def test_a_full_disk_leaves_no_output(
    name: str, place: Path, untouched: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While writing: told by safetensors in its own exception, by our writer in the system's."""
    if name == "profile":
        failing = SafetensorError("I/O error: No space left on device (os error 28)")
        save = Mock(side_effect=failing)
        monkeypatch.setattr("regrow.stages.profile.stage.save_file", save)
    else:
        write = shards._write_shard
        monkeypatch.setattr(
            shards, "_write_shard", lambda path, *rest: write(Path("/dev/full"), *rest)
        )
    message = refused(*command(name, place, place / "model", untouched), at_once=False)
    assert message.startswith(f"no disk space left while writing {untouched}: free some")


def test_a_loss_that_is_nan_from_the_start_ends_in_one_line(
    place: Path, tmp_path: Path, refused: Refused
) -> None:
    weights = load_file(place / "model" / "model.safetensors")
    shutil.copytree(place / "model", place / "student")
    weights["model.norm.weight"][0] = torch.finfo(torch.bfloat16).max  # its logits are infinite
    save_file(weights, place / "student" / "model.safetensors", {"format": "pt"})
    arguments = command("distill", place, place / "student", tmp_path / "out")
    arguments[3] = place / "model"
    message = refused(*arguments, at_once=False)
    assert "loss became nan at step 0; no checkpoint had been written yet" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["distill", "run"])
def test_a_loss_that_turns_nan_ends_in_one_line(
    name: str, place: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 4: it says so, and the checkpoint of step 2 is where it says, and loads."""
    step = DistillTrainer.training_step

    def spoilt(self: DistillTrainer, model: Any, *rest: Any, **named: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            model.get_input_embeddings().weight.data.fill_(torch.inf)
        return step(self, model, *rest, **named)

    monkeypatch.setattr(DistillTrainer, "training_step", spoilt)
    arguments = command(name, place, place / "model", tmp_path / "out")
    message = refused(*arguments, at_once=False)
    out = tmp_path / "out" if name == "distill" else tmp_path / "out" / "stages" / "03-distill"
    kept = out.with_name(f"{out.name}-stopped")
    assert "the loss became nan at step 4" in message
    assert f"the last good checkpoint (checkpoint-2) is kept in {kept}" in message
    assert not out.exists()
    model = AutoModelForCausalLM.from_pretrained(kept)
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    assert AutoTokenizer.from_pretrained(kept).chat_template is not None
