"""Imports point down, stages do not know each other, and what must be quick stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import regrow
from regrow import stage
from regrow.cli.main import commands

SOURCE = Path(regrow.__file__).parent
# From the top down. A module imports only what stands on a lower line, or its own package.
LEVELS = (
    ("__main__",),
    ("cli",),
    ("recipe",),
    ("stages",),
    ("search",),
    ("pruning", "calibration"),
    ("training",),
    ("cost",),
    ("layerwise", "quantization"),
    ("sparsity",),
    ("card",),
    ("stage",),
    ("families", "data"),
    ("plan", "profile_folder"),
    ("checkpoint",),
    ("stage_dir", "llama_cpp"),
    ("runtime",),
    ("plugins",),
    ("config",),
    ("errors",),
)
MAY = {("stage", "stages")}
"""`stage` names the folder in which it looks for the stages."""
LEVEL = {name: number for number, names in enumerate(reversed(LEVELS)) for name in names}


def modules() -> list[Path]:
    """Every module but the package's own front, which names all that is public."""
    return [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


def imported(path: Path) -> set[str]:
    """Dotted names inside regrow that a file imports anywhere: inside functions, for types too."""
    names: set[str] = set()
    package = ("regrow", *path.relative_to(SOURCE).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names.update(f"{module}.{alias.name}" for alias in node.names)
    names |= {name for name in strings(path) if re.fullmatch(r"regrow(\.\w+)+\.?", name)}
    return {name.removeprefix("regrow.") for name in names if name.startswith("regrow.")}


def strings(path: Path) -> set[str]:
    """Names that could be given to import_module, plugins.load and plugins.names."""
    values = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            values.add(node.value)
    return values


def unit(name: str) -> str:
    return name.split(".")[0]


def test_every_module_has_a_level() -> None:
    units = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in modules()}
    assert units == set(LEVEL)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imported(path):
        other = unit(name)
        if other != package and other in LEVEL and (package, other) not in MAY:
            assert LEVEL[other] < LEVEL[package], f"{path} imports regrow.{name}"


STAGES = sorted(path.name for path in (SOURCE / "stages").iterdir() if (path / "stage.py").exists())


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_imports_another_only_where_its_entry_says_so(name: str) -> None:
    allowed = {name, "_flags", "_prompts", *stage.find(name).uses}
    for path in (SOURCE / "stages" / name).rglob("*.py"):
        others = {module.split(".")[1] for module in imported(path) if module.startswith("stages.")}
        assert others <= allowed, f"{path} imports {others - allowed}"


def test_no_files_import_each_other_in_a_circle() -> None:
    fronts = [path for path in modules() if path.stem.startswith("__")]  # hand on what lies below
    files = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
        for path in modules()
        if path not in fronts
    }
    graph = {}
    for module, path in files.items():
        names = {
            name
            for imported_name in imported(path)
            for name in (imported_name, imported_name.rpartition(".")[0])
        }
        graph[module] = set(names & set(files)) - {module}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_the_stages_are_found() -> None:
    assert {"distill", "evaluate", "export", "profile", "prune", "report"} <= set(STAGES)


def test_the_tests_see_every_kind_of_import(tmp_path: Path) -> None:
    """Imports in functions, for types, of a module from its package, and relative ones."""
    (tmp_path / "x.py").write_text(
        "import regrow.a\n"
        "from regrow import b\n"
        "if TYPE_CHECKING:\n    from regrow.c.d import E\n"
        "def f():\n    from regrow.e import g\n    plugins.load('regrow.h.i', name)\n"
        "import torch\n"
    )
    path = SOURCE / "pruning" / "choose.py"
    assert "pruning.choose" not in imported(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_imports.SOURCE", tmp_path)
        assert imported(tmp_path / "x.py") == {"a", "b", "c.d.E", "e.g", "h.i"}


HEAVY = {"torch", "transformers", "datasets", "accelerate", "plotly", "pandas", "numpy"}
OWN_FOR_HELP, OWN_FOR_A_REFUSAL = 42, 37
"""How many modules of ours a command may import to print its help, and to refuse a model."""
LIGHT = {
    "an import": ["-c", "import regrow"],
    "all help": ["-m", "regrow", "--help"],
    "version": ["-m", "regrow", "--version"],
    "a recipe": ["-c", "from regrow.recipe.recipe import read"],
    "configs": ["-c", "from regrow import PruneConfig, DistillConfig, DataConfig, UserError"],
}
MISSING = ["no-such-model", "--out", "out"]
REFUSED = {
    "compare": ["compare", *MISSING, "--profile", "x", "--data", "x.txt"],
    "distill": ["distill", *MISSING, "--teacher", "no-such-model", "--data", "x.txt"],
    **{name: [name, *MISSING, "--data", "x.txt"] for name in ("cache", "generate", "profile")},
    **{name: [name, *MISSING] for name in ("export", "prune", "quantize")},
}


def loaded(*arguments: str, status: int = 0) -> list[str]:
    """Modules that a Python process imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return [line.split("|")[-1].strip() for line in lines]


def check_light(names: list[str], limit: int) -> None:
    """Nothing heavy, and at most `own` modules of ours."""
    assert not {name.split(".")[0] for name in names} & HEAVY
    own_modules = {name for name in names if name.split(".")[0] == "regrow"}
    assert 0 < len(own_modules) <= limit, sorted(own_modules)


@pytest.mark.parametrize("kind", LIGHT)
def test_importing_and_help_are_light(kind: str) -> None:
    check_light(loaded(*LIGHT[kind]), OWN_FOR_HELP)


@pytest.mark.parametrize("name", commands())
def test_help_is_light(name: str) -> None:
    check_light(loaded("-m", "regrow", name, "--help"), OWN_FOR_HELP)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_light(name: str) -> None:
    """A model that is not there is refused before torch is imported."""
    check_light(loaded("-m", "regrow", *REFUSED[name], status=2), OWN_FOR_A_REFUSAL)


def test_importing_does_nothing(tmp_path: Path) -> None:
    """No environment, no file, no output."""
    code = (
        "import sys, os, transformers.trainer\n"  # other packages may talk when they are imported
        "print('ours:', file=sys.stderr, flush=True)\n"
        "before = dict(os.environ)\n"
        "import regrow; [getattr(regrow, name) for name in regrow.__all__]\n"
        "import regrow.cli.main\n"
        "changed = {k for k in os.environ if os.environ[k] != before.get(k)}\n"
        "print(sorted(k for k in changed if k.startswith(('HF_', 'TRANSFORMERS', 'REGROW'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.stdout, done.stderr.partition("ours:\n")[2]) == ("[]\n", "")
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_can_be_imported() -> None:
    """Each is there, from the module that the stub names."""
    for name in regrow.__all__:
        assert getattr(regrow, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = regrow.nothing  # type: ignore[attr-defined]
