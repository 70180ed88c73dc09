"""A recipe in a job of two processes gives what one process gives, and fails in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_distillation import held_out
from tiny_job import (
    DISTILL,
    PROFILE,
    PRUNE,
    call,
    command,
    recipe_fields,
    write_job,
    write_model,
    write_recipe,
    write_text,
)
from tiny_training import free_port

CACHE = {"cache": {"format": "topk", "k": 8}}


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`regrow` in two processes, as torchrun starts them."""
    starter = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    port = ["--master-port", str(free_port()), "-m", "regrow"]
    return subprocess.run(
        [sys.executable, *starter, *port, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    write_model(place / "model")
    write_text(place / "text.jsonl", documents=120)
    return place


def test_two_processes_write_what_one_writes(job: Path) -> None:
    """One writer in each folder; the stages that share their work run in both processes."""
    budget = {"distill": {**DISTILL["distill"], "batch_tokens": 256}}  # two processes share a batch
    fields = recipe_fields(job / "model", job / "text.jsonl", PROFILE, PRUNE, CACHE, budget)
    recipe = write_recipe(job / "recipe.yaml", fields)
    single, parallel = job / "one", job / "two"
    call("run", recipe, "--out", single)
    done = torchrun("run", recipe, "--out", parallel)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stderr.splitlines() if line == "── 1/4 profile"] != []
    assert sum(line.startswith("── 2/4 prune: done in") for line in done.stderr.splitlines()) == 1
    names = sorted(path.name for path in (single / "stages").iterdir())
    assert sorted(path.name for path in (parallel / "stages").iterdir()) == names
    for name in ("01-profile/scores", "02-prune/model", "02-prune-repaired/model"):
        expected, actual = (
            load_file(out / f"stages/{name}.safetensors") for out in (single, parallel)
        )
        assert expected.keys() == actual.keys()
        assert all(bool((actual[key] == expected[key]).all()) for key in expected), name
    alone, together = (
        held_out(single / "stages/04-distill"),
        held_out(parallel / "stages/04-distill"),
    )
    assert list(alone) == list(together)
    assert list(together.values()) == pytest.approx(list(alone.values()), rel=1e-2)
    assert (parallel / "model" / "config.json").exists()
    second_run = torchrun("run", recipe, "--out", parallel)
    assert second_run.returncode == 0, second_run.stderr[-3000:]
    assert "04-distill is complete and unchanged" in second_run.stderr


def test_an_error_in_process_0_ends_both_with_one_line(job: Path) -> None:
    recipe = write_recipe(
        job / "wrong.yaml", recipe_fields(job / "model", job / "text.jsonl", PRUNE)
    )
    done = torchrun("run", recipe, "--out", job / "wrong")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("regrow: error:")]
    message = "stages.0.prune: put a profile stage of the same model before it"
    assert errors == [f"regrow: error: {message}"]
    assert not (job / "wrong").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_command_that_cannot_be_shared_runs_in_process_0(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither waits for the other process nor writes beside it."""
    place = write_job(tmp_path)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    call(*command("quantize", place, place / "model", place / "small"))
    assert (place / "small" / "config.json").exists() == (rank == 0)
