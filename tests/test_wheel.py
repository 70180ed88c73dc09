"""The package as a wheel: it has all files, and it works outside of the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from tiny_models import tiny_config

from regrow.recipe import presets

ROOT = Path(__file__).parents[1]
BUILT = ("pyproject.toml", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
RUBBISH = ("__pycache__", "*.egg-info", "*.pyc")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree, in which setuptools may leave what it likes."""
    place = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns(*RUBBISH))
    for name in BUILT:
        shutil.copyfile(ROOT / name, place / name)
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(place / "dist"))
    subprocess.run([*PIP, "wheel", *options, str(place)], check=True, capture_output=True)
    (path,) = (place / "dist").glob("regrow-*.whl")
    return path


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel alone was installed."""
    folder = tmp_path_factory.mktemp("target")
    options = ("--no-deps", "--no-index", "--no-compile", "--target", str(folder))
    subprocess.run([*PIP, "install", *options, str(wheel)], check=True, capture_output=True)
    return folder


def run(python: Path | str, folder: Path, *arguments: str, path: Path | None = None) -> str:
    """The output of a Python process in `folder`, with packages of `path` before all others."""
    environment = {**os.environ, "REGROW_CACHE": str(folder / "cache"), "COLUMNS": "100"}
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [str(python), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def write_config(folder: Path) -> Path:
    """A folder with the config of a model alone."""
    (folder / "model").mkdir()
    fields = tiny_config("llama", hidden_size=480, vocab_size=32000).to_dict()
    (folder / "model" / "config.json").write_text(json.dumps(fields))
    return folder / "model"


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    package = ROOT / "src" / "regrow"
    wanted = {
        str(path.relative_to(ROOT / "src"))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wanted <= names, sorted(wanted - names)
    endings = {Path(name).suffix for name in wanted}
    assert {".yaml", ".j2", ".css", ".typed", ".pyi"} <= endings
    others = {name for name in names - wanted if ".dist-info/" not in name}
    assert not others
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_works_outside_of_the_repository(target: Path, tmp_path: Path) -> None:
    where = run(
        sys.executable, tmp_path, "-c", "import regrow; print(regrow.__file__)", path=target
    )
    assert Path(where.strip()).is_relative_to(target)
    assert "regrow COMMAND" in run(sys.executable, tmp_path, "-m", "regrow", "--help", path=target)
    advice = ("-m", "regrow", "advise", str(write_config(tmp_path)), "--smaller", "2")
    assert "recipe" in run(sys.executable, tmp_path, *advice, path=target)
    code = "from regrow.recipe import presets; print(*presets.names())"
    assert run(sys.executable, tmp_path, "-c", code, path=target).split() == presets.names()


def test_the_command_is_an_entry_point(target: Path) -> None:
    (entry,) = target.glob("regrow-*.dist-info/entry_points.txt")
    assert "regrow = regrow.cli.main:entry" in entry.read_text()


@pytest.mark.slow
def test_it_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """With the dependencies that the wheel names, and with nothing else."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    assert "regrow COMMAND" in run(python, tmp_path, "-m", "regrow", "--help")
    advice = ("-m", "regrow", "advise", str(write_config(tmp_path)), "--smaller", "2")
    assert "recipe" in run(python, tmp_path, *advice)
