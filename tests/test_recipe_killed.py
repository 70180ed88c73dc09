"""`kill -9` in the middle of a job, then the same command: it goes on, and ends the same."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_job import DISTILL, PROFILE, PRUNE, recipe_fields, write_model, write_recipe, write_text

STEPS, EVERY = 48, 6
LONG = {"distill": {**DISTILL["distill"], "tokens": 128 * STEPS, "eval_tokens": 128 * EVERY}}
JOB = "import sys; from regrow.cli.main import entry; entry()"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, text, a recipe, and the folder `whole` of its uninterrupted run."""
    place = tmp_path_factory.mktemp("killed")
    write_model(place / "model")
    write_text(place / "text.jsonl")
    fields = recipe_fields(place / "model", place / "text.jsonl", PROFILE, PRUNE, LONG)
    write_recipe(place / "recipe.yaml", fields)
    assert start(place, place / "whole").wait() == 0
    return place


def start(place: Path, out: Path, slow: str = "") -> subprocess.Popen[bytes]:
    """The job in a process of its own, one thread; `slow` is Python to run before it."""
    arguments = ["run", str(place / "recipe.yaml"), "--out", str(out)]
    code = f"{slow}\n{JOB}"
    with (place / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=log,
        )


def kill_when(job: subprocess.Popen[bytes], condition: Any) -> None:
    """Kill the job, without mercy, as soon as `seen()`."""
    deadline = time.monotonic() + 300
    try:
        while not condition():
            assert job.poll() is None, "the job ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        job.kill()
        job.wait()


def rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_done(out: Path) -> int:
    return max((row["step"] for row in rows(out / "metrics.jsonl")), default=0)


def same_result(place: Path, out: Path) -> None:
    """The same weights bit for bit, and a journal in which each step is written once."""
    for name in ("model", "stages/02-prune", "stages/02-prune-repaired", "stages/03-distill"):
        uninterrupted, resumed = (
            load_file(run / name / "model.safetensors") for run in (out, place / "whole")
        )
        assert uninterrupted.keys() == resumed.keys()
        assert all(torch.equal(uninterrupted[key], resumed[key]) for key in uninterrupted)
    drop = ("seconds", "epoch")
    journals = [
        [{k: v for k, v in row.items() if k not in drop} for row in rows(run / "metrics.jsonl")]
        for run in (out, place / "whole")
    ]
    assert journals[0] == journals[1]
    assert [row["step"] for row in journals[0] if "loss" in row] == list(range(1, STEPS + 1))


def test_a_run_killed_in_any_stage_resumes_to_the_same_result(place: Path, tmp_path: Path) -> None:
    """Five times, in profile, prune and distill; the sixth process ends as an undisturbed one."""
    out = tmp_path / "run"
    for stage in SLOW:
        kill_while_writing(stage, place, out)
    kill_when(start(place, out, SLOWLY), lambda: steps_done(out) >= 3)
    assert steps_done(out) < EVERY, "no checkpoint yet: it begins again"
    kill_in_checkpoint(place, out)
    kill_when(start(place, out, SLOWLY), lambda: steps_done(out) >= 31)
    reached = steps_done(out)
    assert reached < STEPS
    assert not (out / "stages" / "03-distill").exists()
    assert not (out / "model").exists()
    assert start(place, out).wait() == 0
    assert not list((out / "stages").glob(".*"))
    check_resumed(place, reached)
    same_result(place, out)


SLOWLY = (
    "import time; from regrow.training.trainer import DistillTrainer as Slow\n"
    "step = Slow.training_step\n"
    "Slow.training_step = lambda self, *a, **k: time.sleep(0.03) or step(self, *a, **k)"
)
"""So that a kill hits the step it is meant for, on any machine."""
SLOW = {
    "01-profile": "import regrow.stages.profile.stage as s\n"
    "assert s.score_all; s.score_all = lambda *a: time.sleep(99)",
    "02-prune-repaired": "from regrow.pruning import prune as stage\n"
    "stage.prove_reload = lambda folder: time.sleep(99)",
}
FILES = {"01-profile": "statistics.safetensors", "02-prune-repaired": "model.safetensors"}


def kill_while_writing(name: str, place: Path, out: Path) -> None:
    """Nothing appears under the stage's final name."""
    partial = out / "stages" / f".{name}.partial"
    job = start(place, out, f"import time; {SLOW[name]}")
    kill_when(job, lambda: (partial / FILES[name]).exists())
    assert not (out / "stages" / name).exists()


def kill_in_checkpoint(place: Path, out: Path) -> None:
    """While the trainer writes its second checkpoint: half of it lies beside the first."""
    die = (
        "import os, signal; from transformers import Trainer\n"
        "def die(self, *a):\n"
        f"    if self.state.global_step > {EVERY}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return save(self, *a)\n"
        "save = Trainer._save_optimizer_and_scheduler\n"
        "Trainer._save_optimizer_and_scheduler = die"
    )
    assert start(place, out, die).wait() == -signal.SIGKILL
    trainer = out / "stages" / ".03-distill.partial" / "trainer"
    names = {f"checkpoint-{EVERY}", f"checkpoint-{2 * EVERY}"}
    assert {path.name for path in trainer.iterdir()} == names


def check_resumed(place: Path, reached: int) -> None:
    """Two processes went on from a whole checkpoint, the last from the one before the kill."""
    lines = re.findall(
        r"^distill: continues from checkpoint-(\d+)$", (place / "log").read_text(), re.M
    )
    steps = [int(step) for step in lines]
    assert steps[0] == EVERY
    assert len(steps) == 2
    assert 0 <= reached - steps[1] <= EVERY, "loses at most the steps since the last checkpoint"
