"""Read the pages that explain how to add something, and do what they say."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PACKAGE = Path("src/regrow")


def files(page: str) -> dict[Path, str]:
    """Path and text of each block of docs/`page` that has a title: ```python title="path"."""
    blocks = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    return {Path(title): text for _, title, text in blocks if title}


def commands(page: str) -> list[list[str]]:
    """Arguments of each `regrow` command in the sh blocks of docs/`page`, in order."""
    blocks = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    lines = [
        shlex.split(line, comments=True)
        for language, _, text in blocks
        if language == "sh"
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return [line[1:] for line in lines if line[:1] == ["regrow"]]


@contextmanager
def written(page: str, root: Path) -> Iterator[list[Path]]:
    """The page's files below `root`; those of src/regrow/ can be imported as if they lay there.

    Only new files can be shown in this way: a page that changes a file of the package is refused.
    """
    paths = []
    for path, text in files(page).items():
        assert not (DOCS.parent / path).exists(), f"{page} writes {path}, which is there already"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
        paths.append(root / path)
    folders = {_package(path) for path in files(page) if path.is_relative_to(PACKAGE)}
    packages = [(importlib.import_module(name), root / folder) for name, folder in folders]
    before = set(sys.modules)
    for package, folder in packages:
        package.__path__.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield paths
    finally:
        for package, folder in packages:
            package.__path__.remove(str(folder))
        for name in set(sys.modules) - before:
            _forget(name, [root / folder for _, folder in packages])


def _package(path: Path) -> tuple[str, Path]:
    """The deepest package that exists above a file, and its folder, relative to the repository."""
    folder = next(
        parent for parent in path.parents if (DOCS.parent / parent / "__init__.py").exists()
    )
    return ".".join(folder.relative_to("src").parts), folder


def _forget(name: str, folders: list[Path]) -> None:
    """Undo the import of a module whose file lies in one of `folders`."""
    module = sys.modules[name]
    if any(
        Path(getattr(module, "__file__", None) or "").is_relative_to(folder) for folder in folders
    ):
        del sys.modules[name]
        parent, _, child = name.rpartition(".")
        above: ModuleType | None = sys.modules.get(parent)
        if above is not None and hasattr(above, child):
            delattr(above, child)
