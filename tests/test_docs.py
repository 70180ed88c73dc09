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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [to for to in links if "://" not in to and not (page.parent / to).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_their_flags_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"regrow (\w+) ([^\n`]*)", page.read_text())
    used = [(name, set(re.findall(r"--[a-z][a-z-]*", rest))) for name, rest in shown]
    for name, flags in used:
        if name not in commands():
            continue
        with pytest.raises(SystemExit):
            main([name, "--help"])
        known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        assert flags <= known, (name, flags - known)


def test_the_public_names_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"regrow\.(\w+)", text)):
        assert hasattr(regrow, name), name
