"""The documentation as a site: every page is in it, and a broken link does not go through."""

from __future__ import annotations

import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date() -> None:
    reference = script("reference")
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert text == reference.page(), "run python docs/reference.py"
    assert "| `keep_params` | number" in text
    assert "## regrow distill" in text


def test_every_page_is_in_the_navigation_once() -> None:
    site = script("site")
    named = [path for paths in site.chapters(site.pages()).values() for path in paths]
    assert sorted(named) == site.pages()
    assert not [path for names in site.CHAPTERS.values() for path in names if path not in named]
    assert '{ "Start" = ["README.md", ' in site.navigation(site.chapters(site.pages()))


def test_what_a_page_links_to_is_copied(tmp_path: Path) -> None:
    site = script("site")
    site.collect(tmp_path)
    for name in ("README.md", "docs/concepts.md", "docs/dark-knowledge.svg", "examples/demo.yaml"):
        assert (tmp_path / name).is_file(), name
    assert not (tmp_path / "src" / "regrow" / "cli").exists()


def test_broken_links_are_found(tmp_path: Path) -> None:
    site = script("site")
    (tmp_path / "a.html").write_text(
        '<h2 id="here">x</h2><a href="#here">1</a><a href="#there">2</a><a href="b/">3</a>'
        '<a href="c.html">4</a><a href="https://example.org/x">5</a><img src="b/p.svg">'
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text(
        '<a href="../a.html#here">6</a><a href="../a.html#no">7</a>'
    )
    assert sorted(site.broken_links(tmp_path)) == [
        "a.html: #there (no such heading)",
        "a.html: b/p.svg",
        "a.html: c.html",
        "b/index.html: ../a.html#no (no such heading)",
    ]


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    if not Path(sys.executable).with_name("zensical").exists():
        pytest.skip("zensical is not installed: pip install 'regrow[docs]'")
    command = [sys.executable, str(ROOT / "docs" / "site.py"), "--out", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Dark knowledge" in (tmp_path / "site" / "docs" / "concepts.html").read_text()
