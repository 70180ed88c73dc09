"""Report: one page out of a run folder, whole or in pieces, with nothing in it that can act."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from report_run import write_evaluation, write_manifest, write_metrics, write_run

from regrow.cli.main import main
from regrow.errors import UserError
from regrow.plan import Plan
from regrow.stages.report import ReportConfig
from regrow.stages.report import run_folder as folders
from regrow.stages.report.numbers import duration, figure, millions, title
from regrow.stages.report.page import embedded
from regrow.stages.report.sections.kept import shares
from regrow.stages.report.sections.result import headline
from regrow.stages.report.stage import report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)></script><!--&amp;"
VOID = {"meta", "img", "br", "link", "input", "hr"}
SECTIONS = [
    "result",
    "tradeoff",
    "quality",
    "generations",
    "training",
    "candidates",
    "kept",
    "importance",
    "cost",
    "conventions",
    "provenance",
]


class Page(HTMLParser):
    """Checks the nesting of tags while it reads; gathers tags, attributes, text and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    @property
    def ids(self) -> list[str]:
        return [str(a["id"]) for tag, a in self.tags if tag == "section"]

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        return {
            str(a["id"]).removesuffix("-data"): json.loads(text)
            for a, text in self.scripts
            if a.get("type") == "application/json"
        }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    path = report(run)
    assert path == run / "report.html"
    assert path.stat().st_size < 6e6
    assert not list(run.glob(".report*"))
    return Page(path.read_text())


def loads(page: Page) -> list[str]:
    """Whatever an element would fetch."""
    sources = ("src", "href", "srcset", "data", "poster", "action", "background")
    sources_loaded = [str(a[name]) for _, a in page.tags for name in sources if name in a]
    return [place for place in sources_loaded if not place.startswith("#")]


def test_every_section_is_there_in_order(page: Page) -> None:
    assert page.ids == SECTIONS
    targets = [a["href"] for tag, a in page.tags if tag == "a"]
    assert targets == [f"#{key}" for key in SECTIONS]


def test_the_headline_tells_the_result(run: Path, page: Page) -> None:
    expected = (
        "108.8 M of 134.5 M parameters kept (80.9%); perplexity (heldout) "
        "28.5 → 61 pruned → 47 repaired → 42 distilled; reads prompts 1.33× as fast"
    )
    assert headline([folders.read(run)]) == expected
    assert expected in page.words


def test_the_table_has_values_errors_and_ratios(page: Page) -> None:
    assert "108.8 M0.81×" in page.words
    assert "217.6 MB0.81×" in page.words
    assert "42.00± 1.05 · 1.47×" in page.words
    assert "0.300± 0.010" in page.words


def test_the_page_fetches_nothing(page: Page, run: Path) -> None:
    assert loads(page) == []
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "img", "object", "embed", "base"}
    style = re.search(r"<style>(.*?)</style>", (run / "report.html").read_text(), re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_the_policy_allows_just_the_scripts_of_the_page(page: Page) -> None:
    (policy,) = [a["content"] for tag, a in page.tags if "http-equiv" in a]
    assert policy is not None
    assert "default-src 'none'" in policy
    code = [text for a, text in page.scripts if "type" not in a]
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code}
    assert len(code) == 2
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    assert "http" not in policy
    assert "script-src 'unsafe" not in policy


def test_figures_are_what_plotly_takes(page: Page) -> None:
    assert len(page.figures) == len([a for _, a in page.tags if a.get("class") == "plot"]) == 16
    for plotly_figure in page.figures.values():
        go.Figure(plotly_figure)  # raises for an unknown property or a bad value
        for trace in plotly_figure["data"]:
            assert len(trace["x"]) == len(trace.get("z", [trace["y"]])[0])


def test_figures_show_the_run(page: Page) -> None:
    quality = page.figures["quality-1"]["data"]
    assert [trace["name"] for trace in quality] == ["heldout", "wikitext2"]
    assert quality[0]["x"] == ["teacher", "pruned", "repaired", "distilled"]
    assert quality[0]["y"] == [28.5, 61.0, 47.0, 42.0]
    assert page.figures["quality-2"]["data"][0]["x"] == ["pruned", "repaired", "distilled"]
    losses = page.figures["training-1"]["data"]
    assert [trace["name"] for trace in losses] == ["loss", "loss, running mean", "held-out KL"]
    assert losses[2]["x"] == [2048 * n for n in range(25, 201, 25)]
    bars = page.figures["importance-1"]["data"][0]["marker"]["color"]
    assert [colour == bars[0] for colour in bars] == [True] * 4 + [False, True]
    assert "MLP channels, by activation_l2" in page.words


def test_a_plan_applied_twice_counts_once(run: Path) -> None:
    (cut,) = folders.read(run).cuts
    assert cut.name == "02-prune"
    assert len(cut.candidates) == 3
    assert cut.profile is not None
    assert cut.profile.folder.name == "01-profile"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    labels = tuple(f"{HOSTILE}{n}" for n in range(4))
    path = report(write_run(tmp_path / "run", labels, HOSTILE), config=ReportConfig(title=HOSTILE))
    page = Page(path.read_text())
    allowed = {"details", "summary", "pre", "article", "figure", "figcaption", "small", "script"}
    allowed |= {"html", "head", "meta", "title", "style", "body", "header", "h1", "p", "nav", "a"}
    allowed |= {"main", "section", "h2", "h3", "h4", "div", "table", "thead", "tbody", "tr", "th"}
    assert {tag for tag, _ in page.tags} <= allowed | {"td", "footer"}
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert len([a for a, _ in page.scripts if "type" not in a]) == 2
    assert loads(page) == []
    words = " ".join(HOSTILE.split())
    assert page.words.count(words) >= 4 + 4 + 4 + 3  # table, answers, their prompt, title, recipe
    names = page.figures["quality-1"]["data"][0]["x"]
    assert all("<" not in name and "&lt;script&gt;" in name for name in names)
    raw = [text for a, text in page.scripts if "type" in a]
    assert not [text for text in raw if "<" in text or "&" in text]


def test_embedded_json_is_parsed_back_unchanged() -> None:
    value = {"</script>": ["<!--", "&lt;", "\u2028", 1.5]}
    text = str(embedded(value))
    assert json.loads(text) == value
    assert "<" not in text
    assert "&" not in text


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        ("stages/04-evaluate", {"result", "tradeoff", "quality", "generations", "conventions"}),
        ("stages/01-profile", {"importance"}),
        ("stages/01-profile/scores.safetensors", {"importance"}),
        ("metrics.jsonl", {"training"}),
        ("stages/02-prune-repaired/candidates.json", {"candidates"}),
        ("recipe.yaml", set()),
    ],
)
def test_a_missing_file_only_removes_its_sections(
    tmp_path: Path, gone: str, missing: set[str]
) -> None:
    folder = write_run(tmp_path / "run")
    place = folder / gone
    for path in [*place.glob("*"), place]:
        path.rmdir() if path.is_dir() else path.unlink()
    page = Page(report(folder, tmp_path / "page.html").read_text())
    assert page.ids == [key for key in SECTIONS if key not in missing]


def test_stages_of_an_earlier_recipe_are_left_out(tmp_path: Path) -> None:
    """Other stages had these numbers before; their folders and rows are still there."""
    folder = write_run(tmp_path / "run")
    expected = undated(report(folder, tmp_path / "page.html"))
    write_evaluation(folder / "stages" / "05-evaluate", ["old", "older"], "Hi", "there")
    write_manifest(folder / "stages" / "05-evaluate", "evaluate")
    rows = (folder / "metrics.jsonl").read_text()
    write_metrics(folder / "metrics.jsonl", "02-distill", steps=30)
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + rows)
    assert undated(report(folder, tmp_path / "again.html")) == expected


def undated(page: Path) -> str:
    """A page without the minute in which it was written."""
    return re.sub(r"\d\d:\d\d UTC", "", page.read_text())


def test_a_lone_evaluation_and_an_unfinished_run(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    write_evaluation(alone, ["one", "two"], "Hi", "there")
    write_manifest(alone, "evaluate")
    page = Page(report(alone).read_text())
    assert page.ids == [
        *("result", "tradeoff", "quality", "generations", "cost", "conventions", "provenance")
    ]
    running = tmp_path / "running"
    running.mkdir()
    write_metrics(running / "metrics.jsonl", "03-distill", steps=30)
    with (running / "metrics.jsonl").open("a") as file:
        file.write(
            '{"stage": "03-distill", "step": 31, "tokens": 63488, "loss": NaN}\n{"stage": "0'
        )
    page = Page(report(running).read_text())
    assert page.ids == ["training"]
    assert "Not evaluated yet" in page.words
    assert len(page.figures["training-1"]["data"][0]["x"]) == 30


def test_kept_shares_by_hand() -> None:
    plan = Plan(
        model_type="llama",
        fingerprint="",
        before={"layers": 2, "mlp": 8},
        after={"layers": 1, "mlp": 3},
        layers=[1],
        mlp={1: [0, 1, 5]},
    )
    assert shares(plan, "mlp", bins=4) == [[None] * 4, [1.0, 0.0, 0.5, 0.0]]
    assert shares(plan, "mlp") == [[None] * 8, [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]]


def test_numbers_are_formatted_for_readers() -> None:
    assert [millions(v) for v in (999, 1500, 134_515_008, 7.2e9)] == [
        "999",
        "1.5 k",
        "134.5 M",
        "7.2 B",
    ]
    assert figure("bytes", 269_030_016) == "269.0 MB"
    assert figure("kl/c4", 0.12345) == "0.123"
    assert figure("perplexity/c4", 28.553) == "28.55"
    assert figure("prefill", 1234.5) == "1,234"
    assert title("perplexity/c4") == "perplexity, c4"
    assert title("decode") == "decode tokens/s"
    assert [duration(s) for s in (4.4, 65, 4801)] == ["4 s", "1 min 5 s", "1 h 20 min"]


def test_a_folder_without_a_run_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, run: Path, out: Path | None = None) -> None:
        with pytest.raises(UserError, match=match) as caught:
            report(run, out)
        assert "\n" not in str(caught.value)

    refused("has no run: expected stages/", tmp_path / "nowhere")
    folder = write_run(tmp_path / "run")
    refused("is a folder: give --out the name", folder, tmp_path)
    (folder / "stages/04-evaluate/evaluation.json").write_text("{")
    refused("evaluation.json is not valid JSON", folder)
    assert not (folder / "report.html").exists()
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "regrow.stages.report.stage.find_spec",
        lambda name: None if name == "plotly" else real(name),
    )
    refused(r"pip install 'regrow\[report\]'", folder)


def test_a_foreign_file_is_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_run(tmp_path / "run"), tmp_path / "page.html"
    foreign = "<!DOCTYPE html>\n<html><body>Mine, with notes on regrow</body></html>"
    out.write_text(foreign)
    expected = f"{out} exists and was not written by regrow report: give --out another name"
    for more in ([], ["--dry-run"]):
        assert main(["report", str(folder), "--out", str(out), *more]) == 2
        assert capsys.readouterr().err == f"regrow: error: {expected}\n"
    assert out.read_text() == foreign
    earlier = report(folder).read_text().replace('<meta name="generator" content="regrow">\n', "")
    for own in (earlier, report(folder).read_text(), ""):
        out.write_text(own)
        assert report(folder, out) == out
    assert '<meta name="generator" content="regrow">' in out.read_text()
