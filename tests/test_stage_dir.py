"""A stage's folder: complete or absent, skipped when unchanged, never put over other files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import regrow
from regrow.config import Config
from regrow.errors import UserError
from regrow.stage_dir import Figure, StageDir, digest, forget, is_full_disk, read, refuse_foreign


class Fields(Config):
    """Some fields."""

    number: int = 1
    """A number."""


INPUTS = {"model": "abc"}


def stage_of(
    out: Path,
    number: int = 1,
    inputs: dict[str, str] = INPUTS,
    name: str = "prune",
    resumable: bool = False,
) -> StageDir:
    return StageDir(out, name, Fields(number=number), inputs, resumable)


def finish(out: Path, content: str = "first", number: int = 1) -> None:
    with stage_of(out, number) as folder:
        (folder / "result").write_text(content)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def files_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_a_finished_stage_is_complete(out: Path) -> None:
    assert not stage_of(out).complete
    stage = stage_of(out)
    with stage as folder:
        assert folder != out
        (folder / "result").write_text("first")
        stage.figures.append(Figure(name="parameters", value=3, unit="parameters"))
        stage.extra["more"] = [1]
        assert not out.exists()
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "result"]
    assert files_beside(out) == ["out"]
    assert stage_of(out).complete
    manifest = read(out)
    assert manifest is not None
    assert (manifest["stage"], manifest["config"], manifest["inputs"]) == (
        "prune",
        {"number": 1},
        INPUTS,
    )
    assert manifest["figures"] == [
        {"name": "parameters", "value": 3.0, "unit": "parameters", "convention": ""}
    ]
    assert manifest["more"] == [1]
    assert manifest["versions"]["regrow"] == regrow.__version__
    assert {"torch", "transformers", "python"} <= set(manifest["versions"])
    assert manifest["digest"] == digest("prune", {"number": 1}, INPUTS, regrow.__version__)


def test_another_config_input_or_version_is_not_complete(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another config, input or version of regrow is another stage."""
    finish(out)
    assert not stage_of(out, number=2).complete
    assert not stage_of(out, inputs={"model": "abd"}).complete
    assert not stage_of(out, inputs={**INPUTS, "profile": "1"}).complete
    assert stage_of(out).complete
    monkeypatch.setattr(regrow, "__version__", "9.9")
    assert not stage_of(out).complete


def test_the_digest_depends_on_content_not_on_the_order_of_keys() -> None:
    """Of the content, not of the order of keys; told apart where parts could run together."""
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest("ab", "c") != digest("a", "bc")
    assert digest([1]) != digest(["1"])


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt(), UserError("theirs")])
def test_a_failure_keeps_the_old_result(error: BaseException, out: Path) -> None:
    """The exception passes; nothing new is there, and the old result still is."""

    def fail(number: int) -> None:
        with stage_of(out, number) as folder:
            (folder / "result").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail(1)
    assert files_beside(out) == []
    finish(out)
    with pytest.raises(type(error)):
        fail(2)
    assert files_beside(out) == ["out"]
    assert (out / "result").read_text() == "first"
    assert stage_of(out).complete


def test_a_second_run_replaces_the_result(out: Path) -> None:
    finish(out)
    (out / "left over").write_text("x")
    finish(out, "second", number=2)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "result"]
    assert (out / "result").read_text() == "second"
    assert stage_of(out, number=2).complete
    assert not stage_of(out).complete


def interrupt(out: Path, number: int = 1, resumable: bool = True) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(stage_of(out, number, resumable=resumable))


def write_half(stage: StageDir) -> None:
    with stage as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt


def test_a_resumable_stage_continues_in_its_folder(out: Path) -> None:
    """What an interrupted stage wrote is there when the same stage begins again, and only then."""
    interrupt(out)
    assert not out.exists()
    with stage_of(out, resumable=True) as folder:
        assert (folder / "half").read_text() == "half"
    assert sorted(path.name for path in out.iterdir()) == ["half", "manifest.json"]
    interrupt(out, number=2)
    with stage_of(out, number=3, resumable=True) as folder:
        assert not (folder / "half").exists()
    interrupt(out, number=4, resumable=False)
    with stage_of(out, number=4, resumable=True) as folder:
        assert not (folder / "half").exists()


def test_the_resume_digest_decides_whether_a_stage_continues(out: Path) -> None:
    """A stage may say itself what makes it the same: a raised budget does not."""

    def stage(number: int) -> StageDir:
        fields = Fields(number=number)
        return StageDir(out, "distill", fields, INPUTS, resumable=True, resume_digest="same")

    with pytest.raises(KeyboardInterrupt):
        write_half(stage(1))
    with stage(2) as folder:
        assert (folder / "half").exists()
    assert stage(2).complete
    assert not stage(1).complete
    manifest = read(out)
    assert manifest is not None
    assert manifest["resume_digest"] == "same"


FOREIGN = {
    "a folder": ({"notes.txt": "mine"}, "has files that are not from regrow"),
    "a foreign manifest": (
        {"manifest.json": '{"name": "app"}'},
        "has files that are not from regrow",
    ),
    "a broken manifest": (
        {"manifest.json": '{"digest": "1", '},
        "has files that are not from regrow",
    ),
    "another stage": (
        {"manifest.json": '{"stage": "profile", "digest": "1"}'},
        "has the result of profile: give prune a new or empty folder",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_with_other_files_is_refused(kind: str, out: Path) -> None:
    files, expected = FOREIGN[kind]
    out.mkdir(parents=True)
    for name, text in files.items():
        (out / name).write_text(text)
    with pytest.raises(UserError, match=expected):
        stage_of(out)
    assert {path.name: path.read_text() for path in out.iterdir()} == files


def test_empty_and_own_folders_are_taken(out: Path) -> None:
    out.mkdir(parents=True)
    finish(out)
    refuse_foreign(out)
    refuse_foreign(out, "prune")


def told_by_safetensors() -> Exception:
    from safetensors import SafetensorError

    return SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


FULL = {
    "ENOSPC": OSError(28, "No space left on device"),
    "quota": OSError(122, "Disk quota exceeded"),
    "safetensors": told_by_safetensors(),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_is_reported_in_one_line(kind: str, out: Path) -> None:
    finish(out)
    stage = stage_of(out, number=2)
    with (
        pytest.raises(UserError, match=f"no disk space left while writing {out}: free some"),
        stage,
    ):
        raise FULL[kind]
    assert files_beside(out) == ["out"]
    assert stage_of(out).complete


def test_other_errors_are_no_full_disk() -> None:
    assert not is_full_disk(OSError(13, "Permission denied"))
    assert not is_full_disk(RuntimeError("out of memory"))
    assert not is_full_disk(None)


def test_disk_is_full_at_the_manifest(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("regrow.stage_dir.write_json", full)
    with pytest.raises(UserError, match="no disk space left"), stage_of(out):
        pass
    assert files_beside(out) == []


@pytest.mark.parametrize("moved", [False, True])
def test_killed_while_replacing(moved: bool, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames no folder is at `out`; the next command puts the new one there.

    Before the new one is whole, the old one is put back.
    """
    finish(out)
    renames = []

    def rename(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        shutil.move(self, target)
        return target

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            finish(out, "second", number=2)
    assert not out.exists()
    if not moved:
        shutil.rmtree(out.parent / ".out.partial")
    assert stage_of(out, number=2).complete is moved
    assert (out / "result").read_text() == ("second" if moved else "first")


def test_a_finished_result_is_not_replaced_without_a_word(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(stage: StageDir) -> str:
        with pytest.raises(KeyboardInterrupt):
            write_half(stage)
        return capsys.readouterr().err

    end = ": it will be replaced when this one is complete\n"
    assert said(stage_of(out)) == ""
    finish(out)
    assert said(stage_of(out)) == ""
    start = f"prune: {out} holds a finished prune "
    assert said(stage_of(out, number=2)) == f"{start}with other settings (number){end}"
    changed = {"model": "abd", "profile": "1"}
    assert said(stage_of(out, inputs=changed)) == f"{start}with other inputs (model, profile){end}"
    monkeypatch.setattr(regrow, "__version__", "9.9")
    assert said(stage_of(out)) == f"{start}of another version of regrow{end}"
    forget(out)
    assert said(stage_of(out, number=2)) == ""
