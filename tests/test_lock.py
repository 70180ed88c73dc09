"""Two processes with the same output: one writes, the other is refused; a kill frees the lock."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_job import PROFILE, recipe_fields, write_model, write_recipe, write_text

from regrow.cli.main import main
from regrow.config import Config
from regrow.errors import UserError
from regrow.runtime import lock as locks
from regrow.runtime.lock import Lock, state
from regrow.stage_dir import LOCK, StageDir
from regrow.stages.export.stage import FileStageDir

STAGE = (
    "import sys, time; from pathlib import Path; from regrow.config import Config\n"
    "from regrow.stage_dir import StageDir\n"
    "with StageDir(Path(sys.argv[1]), 'distill', Config(), {}, resumable=True) as folder:\n"
    "    (folder / 'half').write_text('half'); print('writes', flush=True); time.sleep(99)"
)
JOB = (
    "import time, regrow.stages.profile.stage as s\n"
    "assert s.score_all; s.score_all = lambda *a: print('writes', flush=True) or time.sleep(99)\n"
    "from regrow.cli.main import entry; entry()"
)


def writing(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that has begun to write."""
    script = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(
        script, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writes\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_stage_in_two_processes(tmp_path: Path) -> None:
    """The second one is refused, changes nothing, and continues the first one after a kill."""
    out = tmp_path / "out"
    first = writing(STAGE, out)
    line = f"{out} is being written by another regrow process ({first.pid} on "
    line += f"{socket.gethostname()}): wait for it, or stop it"
    try:
        with pytest.raises(UserError) as caught:
            StageDir(out, "distill", Config(), {}, resumable=True)
        assert str(caught.value) == line
        assert (tmp_path / ".out.partial" / "half").exists()
    finally:
        kill(first)
    assert (tmp_path / ".out.lock").exists()
    with StageDir(out, "distill", Config(), {}, resumable=True) as folder:
        assert (folder / "half").exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["half", "manifest.json", "out"]


def test_an_export_in_two_processes_names_its_file(tmp_path: Path) -> None:
    """Not the hidden folder that it is written in."""
    file = tmp_path / "small.gguf"
    other = Lock(tmp_path / "..small.gguf.export.lock", file)
    other.acquire()
    with other, pytest.raises(UserError, match=f"{file} is being written by another"):
        FileStageDir(file, "export", Config(), {})


def test_two_processes_that_start_at_once(tmp_path: Path) -> None:
    """Both have looked before the first one begins; the second one is refused when it begins."""
    out = tmp_path / "out"
    stage = StageDir(out, "distill", Config(), {}, resumable=True)
    first = writing(STAGE, out)
    try:
        with pytest.raises(UserError, match="is being written by another"), stage:
            pytest.fail("two writers")
        assert (tmp_path / ".out.partial" / "half").exists()
    finally:
        kill(first)


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_in_two_processes(
    tmp_path: Path, begun: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model")
    write_text(tmp_path / "text.jsonl", documents=120)
    fields = recipe_fields(tmp_path / "model", tmp_path / "text.jsonl", PROFILE)
    command = ["run", write_recipe(tmp_path / "recipe.yaml", fields), "--out", tmp_path / "run"]
    first = writing(JOB, *command)
    assert state(tmp_path / "run" / LOCK) == "held"
    try:
        if not begun:  # as if the first one had begun while this one checked its recipe
            (tmp_path / "run" / "recipe.yaml").unlink()
        second = subprocess.run(
            [sys.executable, "-m", "regrow", *map(str, command)], capture_output=True, text=True
        )
        line = f"{tmp_path / 'run'} is being written by another regrow process ({first.pid} on "
        assert second.returncode == 2
        assert second.stderr.startswith(f"regrow: error: {line}")
        assert second.stderr.count("\n") == 1
    finally:
        kill(first)
    assert state(tmp_path / "run" / LOCK) == "free"
    if begun:
        assert main(["watch", str(tmp_path / "run")]) == 0
        assert "■ stopped; the same command continues it" in capsys.readouterr().out


def test_no_file_is_left(tmp_path: Path) -> None:
    """Neither after a result, nor after an error; a folder without a lock is free."""
    lock = Lock(tmp_path / "lock", tmp_path)
    with lock:
        lock.acquire()
        lock.acquire()
        assert state(tmp_path / "lock") == "held"
    assert list(tmp_path.iterdir()) == []
    assert state(tmp_path / "lock") == "free"
    with pytest.raises(KeyboardInterrupt), StageDir(tmp_path / "out", "distill", Config(), {}):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_only_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the one who gives the lock back deletes the file that another one has opened."""
    monkeypatch.setattr(locks, "PATIENCE", 60.0)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    inside: list[int] = []
    together: list[int] = []

    def work() -> None:
        for _ in range(100):
            with Lock(tmp_path / "lock", tmp_path) as lock:
                lock.acquire()
                inside.append(1)
                together.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1] * 400


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with StageDir(tmp_path / "out", "distill", Config(), {}):
        assert state(tmp_path / ".out.lock") == "unknown"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "nowhere" / "lock", tmp_path)
    lock.acquire()
    lock.refuse()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_host_is_not_known_to_be_free(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("1 on elsewhere")
    assert state(tmp_path / "lock") == "unknown"
