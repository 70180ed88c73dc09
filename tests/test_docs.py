"""What the documents say exists: examples parse, links lead somewhere, flags and names are real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from tiny_job import write_model, write_text

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
    text = re.sub(r"\\\n\s*", "", page.read_text())  # a command may go on in the next line
    shown = re.findall(r"regrow (\w+) ([^\n`]*)", text)
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


def yaml_blocks(page: Path) -> list[str]:
    return re.findall(r"^```yaml[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_recipes_in_the_text_are_recipes(page: Path) -> None:
    """A block with model, data and stages is a recipe; one with stages alone has valid stages."""
    if page.name == "add-a-stage.md":  # its stage is there only in tests/test_add_pages.py
        return
    for block in yaml_blocks(page):
        fields = yaml.safe_load(block)
        if isinstance(fields, list):
            fields = {"stages": fields}
        if isinstance(fields, dict) and "stages" in fields:
            rest = {"model": "x", "data": "y.txt"}
            assert recipe.Recipe.model_validate({**rest, **fields}).steps()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_in_the_text_is_python(page: Path) -> None:
    """Each block compiles, and the names that it takes from regrow are there."""
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        compile(block, str(page), "exec")
        for name in re.findall(r"\bregrow\.(\w+)\(", block):
            assert hasattr(regrow, name), name


def tutorial_commands() -> list[list[str]]:
    """The arguments of each `regrow` command of the tutorial, in order."""
    lines = re.findall(r"^    regrow (.*)$", (ROOT / "docs/tutorial.md").read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def tiny_tutorial(folder: Path) -> None:
    """The tutorial's recipe in `folder`, with its stages, for a tiny model and its text."""
    write_model(folder / "tiny", num_hidden_layers=2, intermediate_size=96)
    text = write_text(folder / "text.jsonl", documents=800)
    (folder / "novel.txt").write_text(text.read_text()[:20000])
    (block,) = yaml_blocks(ROOT / "docs/tutorial.md")
    fields = yaml.safe_load(block)
    fields["model"] = "tiny"
    fields["data"] = {"sources": "text.jsonl", "sequence_length": 64}
    for entry in fields["stages"]:
        if isinstance(entry, dict) and "prune" in entry:
            entry["prune"] |= {"intermediate_size": 64}
        if isinstance(entry, dict) and "evaluate" in entry:
            entry["evaluate"] |= {
                "texts": {"novel": "novel.txt"},
                "window": 64,
                "prefill_tokens": 32,
            }
    (folder / "first.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))


def test_the_tutorial_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its commands in order, in an empty folder; a tiny model stands for the real one."""
    monkeypatch.chdir(tmp_path)
    tiny_tutorial(tmp_path)
    given = tutorial_commands()
    assert [line[0] for line in given][:2] == ["inspect", "advise"]
    assert {"run", "export", "watch"} <= {line[0] for line in given}
    for line in given:
        arguments = ["tiny" if word.startswith("package:") else word for word in line]
        if "Q8_0" in arguments:  # the rows of a tiny model are too short for blocks of 32
            arguments[arguments.index("Q8_0")] = "F16"
        assert main(arguments) == 0, arguments
    assert (tmp_path / "runs/first/report.html").exists()
    card = (tmp_path / "runs/first/model/README.md").read_text()
    assert "novel" in card
