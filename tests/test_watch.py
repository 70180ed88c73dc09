"""Watch: what a run's files say of it, shown on a terminal, and an end when it is complete."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from report_run import write_manifest, write_metrics, write_run
from rich.console import Console

from regrow.cli import watch
from regrow.cli.main import main
from regrow.cli.watch import RunState, frame, read, sparkline

NOW = 1_000_000.0


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The state of the lock of every run."""
    states = ["held"]
    monkeypatch.setattr("regrow.runtime.lock.state", lambda path: states[0])
    return states


def aged(folder: Path, seconds: float = 0.0) -> Path:
    """All files as if written so long before NOW."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (NOW - seconds, NOW - seconds))
    return folder


def running(tmp_path: Path, steps: int = 120) -> Path:
    """A run in its distillation."""
    folder = write_run(tmp_path / "run")
    for name in ("03-distill", "04-evaluate"):
        shutil.rmtree(folder / "stages" / name)
    (folder / "stages" / ".03-distill.partial").mkdir()
    write_metrics(folder / "metrics.jsonl", "03-distill", steps, {"forward_kl": 1.0, "hidden": 2.0})
    return aged(folder)


def published(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run")
    shutil.copytree(folder / "stages" / "03-distill", folder / "model")
    return aged(folder)


def shown(state: RunState, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(frame(state))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def progress_of(state: RunState) -> dict[str, str]:
    return {stage.name: stage.progress for stage in state.stages}


def test_a_running_run_shows_its_stages(tmp_path: Path) -> None:
    state = read(running(tmp_path), NOW + 10)
    assert progress_of(state) == {
        "01-profile": "done", "02-prune": "done", "03-distill": "running", "04-evaluate": "waiting",
    }  # fmt: skip
    assert [stage.seconds for stage in state.stages] == [61.5, 123.0, 10.0, None]
    assert not state.complete
    training = state.training
    assert training is not None
    assert (training.stage, training.tokens, training.total) == ("03-distill", 245_760, 409_600)
    assert training.rate == pytest.approx(2048 / 7)
    assert training.eta == pytest.approx((409_600 - 245_760) / (2048 / 7) - 10)
    assert list(training.losses) == ["loss", "learning_rate", "forward_kl", "hidden"]
    assert training.losses["hidden"] == pytest.approx(2 * training.losses["loss"])
    assert len(training.heldout) == 4


def test_a_frame_shows_stages_rate_and_losses(tmp_path: Path) -> None:
    text = shown(read(running(tmp_path), NOW + 10))
    lines = text.splitlines()
    assert "03-distill   ▶ running  0:10" in lines
    assert "02-prune     ✓ done     2:03" in lines
    assert "03-distill  60%  245,760/409,600 tokens  293 tokens/s  ETA 9:10" in lines
    assert any(line.startswith("held-out KL 0.6341 → 0.4528  █") for line in lines)
    assert "hidden" in text and "complete" not in text and "nothing written" not in text
    assert "nothing written for 5:00" in shown(read(running(tmp_path / "b"), NOW + 300))


def test_the_rate_is_of_the_last_process(tmp_path: Path) -> None:
    folder = running(tmp_path, 20)
    lines = (folder / "metrics.jsonl").read_text()
    later = [
        {"stage": "03-distill", "step": n, "tokens": 2048 * n, "seconds": 2.0 * (n - 20), "loss": 1}
        for n in range(21, 25)
    ]
    (folder / "metrics.jsonl").write_text(lines + "".join(json.dumps(r) + "\n" for r in later))
    training = read(folder, NOW).training
    assert training is not None and training.rate == pytest.approx(1024)


def test_complete_only_when_the_model_is_published(tmp_path: Path) -> None:
    folder = published(tmp_path)
    assert read(folder, NOW).complete
    assert "complete" in shown(read(folder, NOW))
    write_manifest(folder / "model", "distill", finished="2026-01-01T00:00:00Z")
    assert not read(folder, NOW).complete
    shutil.rmtree(folder / "model")
    assert not read(folder, NOW).complete


def test_stages_of_an_earlier_run_are_marked(tmp_path: Path) -> None:
    folder = published(tmp_path)
    (folder / "stages" / ".02-prune-repaired.partial").mkdir()
    assert progress_of(read(aged(folder), NOW)) == {
        "01-profile": "done", "02-prune": "running", "03-distill": "earlier",
        "04-evaluate": "earlier",
    }  # fmt: skip


def test_a_repaired_pruning_is_two_folders(tmp_path: Path) -> None:
    folder = published(tmp_path)
    shutil.rmtree(folder / "stages" / "02-prune")
    assert progress_of(read(folder, NOW))["02-prune"] == "running"


def test_the_page_must_be_of_this_run(tmp_path: Path) -> None:
    folder = published(tmp_path)
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe + "- report\n")
    assert progress_of(read(aged(folder), NOW))["05-report"] == "running"
    (folder / "report.html").write_text("page")
    for path in (folder, folder / "report.html"):
        os.utime(path, (NOW - 500, NOW - 500))
    assert progress_of(read(folder, NOW + 1))["05-report"] == "running"  # of an earlier run
    assert progress_of(read(folder, NOW + 100))["05-report"] == "done"  # a copied folder
    os.utime(folder / "report.html", (NOW, NOW))
    assert progress_of(read(folder, NOW + 1))["05-report"] == "done"


def test_sparkline_by_hand() -> None:
    assert sparkline([0.0, 7.0, 3.0]) == "▁█▄"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([1.0, float("nan"), 0.0]) == "█▁"
    assert sparkline([float(n) for n in range(100)], 5) == "▁▃▅▆█"


def test_hostile_names_are_text(tmp_path: Path) -> None:
    words = "[bold]x[/bold]\x1b[31m<script>"
    folder = write_run(tmp_path / "[red]run", words=words)
    text = shown(read(folder), 400)
    assert "[bold]x[/bold]�[31m<script>" in text
    assert "[red]run" in text
    assert "\x1b" not in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_watching_ends_when_the_run_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = read(running(tmp_path)), read(published(tmp_path / "later"))
    left = [before, before, after]
    monkeypatch.setattr(watch, "read", lambda folder: left.pop(0))
    monkeypatch.setattr(sys, "stdout", Terminal())
    watch.watch(tmp_path, every=0.01)
    assert left == []
    assert isinstance(sys.stdout, Terminal)
    assert "▶ running" in sys.stdout.getvalue() and "complete" in sys.stdout.getvalue()


@pytest.mark.parametrize("flags", [["--once"], []])
def test_one_frame_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert main(["watch", str(running(tmp_path)), *flags]) == 0
    assert capsys.readouterr().out.count("▶ running") == 1


def test_a_run_whose_process_has_ended_is_stopped(
    tmp_path: Path, held: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time stands still, and watching it ends; nothing is said of a complete run."""
    folder = running(tmp_path)
    held[0] = "free"
    state = read(folder, NOW + 500)
    assert progress_of(state)["03-distill"] == "stopped"
    assert [stage.seconds for stage in state.stages] == [61.5, 123.0, 0.0, None]
    text = shown(state)
    assert "03-distill   ■ stopped  0:00" in text.splitlines()
    assert text.endswith("■ stopped; the same command continues it\n")
    assert "ETA" not in text and "running" not in text and "nothing written" not in text
    monkeypatch.setattr(sys, "stdout", Terminal())
    watch.watch(folder, every=60)
    assert not read(published(tmp_path / "later"), NOW).stopped
    held[0] = "unknown"
    assert progress_of(read(folder, NOW))["03-distill"] == "running"


@pytest.mark.parametrize("name", ["nowhere", "empty", "stages"])
def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "stages" / "stages").mkdir(parents=True)
    assert main(["watch", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"regrow: error: {tmp_path / name} is no run: expected recipe.yaml")
    assert "it has just been started" in line


@pytest.mark.parametrize("every", ["0.0", "nan", "inf"])
def test_a_frame_each_no_time_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], every: str
) -> None:
    assert main(["watch", str(running(tmp_path)), "--every", every]) == 2
    assert f"--every {every}: give a number of seconds above 0" in capsys.readouterr().err
