"""What the documents say exists: examples parse, links lead somewhere, flags and names are real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import regrow
from regrow.cli.main import commands, main
from regrow.recipe import recipe

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.yaml")), ids=lambda p: p.name)
def test_examples_are_recipes(path: Path) -> None:
    assert recipe.read(path).steps()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text()
    links = [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r"^\[[^]]+\]: (\S+)", text, re.M)]
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_in_the_text_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it names files of earlier versions
        return
    paths = re.findall(r"`((?:src|tests|docs|examples|benchmarks)/[\w./-]+)`", page.read_text())
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_their_flags_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"regrow (\w+) ([^\n`]*)", page.read_text())
    used = [(name, set(re.findall(r"--[a-z][a-z-]*", rest))) for name, rest in shown]
    for name, flags in used:
        if name not in commands():
            continue
        with pytest.raises(SystemExit):
            main([name, "--help"])
        known_flags = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        assert flags <= known_flags, (name, flags - known_flags)


def test_the_public_names_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"regrow\.(\w+)", text)):
        assert hasattr(regrow, name), name
