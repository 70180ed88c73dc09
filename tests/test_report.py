"""Report: one page out of a run folder, whole or in pieces, with nothing in it that can act."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from safetensors.torch import save_file

from regrow.errors import UserError
from regrow.plan import Plan
from regrow.stages.report import ReportConfig, report
from regrow.stages.report import run_folder as folders
from regrow.stages.report.numbers import duration, figure, millions, title
from regrow.stages.report.page import embedded
from regrow.stages.report.sections.kept import shares
from regrow.stages.report.sections.result import headline

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)></script><!--&amp;"
VOID = {"meta", "img", "br", "link", "input", "hr"}
SECTIONS = [
    "result",
    "quality",
    "generations",
    "training",
    "candidates",
    "kept",
    "importance",
    "conventions",
    "provenance",
]
BEFORE = {"layers": 6, "hidden": 64, "mlp": 200, "heads": 8, "kv_heads": 2, "vocab": 384}


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


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def figures_of(step: int, parameters: int) -> list[dict[str, Any]]:
    how = "first 16,384 tokens of test.txt, windows of 512"
    values = [28.5, 61.0, 47.0, 42.0]
    found: list[dict[str, Any]] = [
        {"name": "parameters", "value": parameters, "convention": "tied weights counted once"},
        {"name": "bytes", "value": 2 * parameters, "unit": "bytes", "convention": "tensors"},
        {
            "name": "prefill",
            "value": 900.0 + 100 * step,
            "unit": "tokens/s",
            "n": 3,
            "convention": f"batch 1; runs from {890 + step} to {910 + step}",
        },
    ]
    for number, text in enumerate(("heldout", "wikitext2")):
        value = values[step] * (1 + number / 10)
        found.append(
            {
                "name": f"perplexity/{text}",
                "value": value,
                "n": 16352,
                "stderr": value / 40,
                "convention": how,
            }
        )
        if step:
            kl = {"name": f"kl/{text}", "value": 0.9 / step, "unit": "nats", "n": 16352}
            found.append({**kl, "stderr": 0.01, "convention": how})
    return found


def write_evaluation(folder: Path, labels: list[str], prompt: str, answer: str) -> None:
    full = 134_515_008
    found = {
        label: figures_of(step, full if step == 0 else 108_800_000)
        for step, label in enumerate(labels)
    }
    generations = {
        label: [{"prompt": prompt, "text": f"{answer} {n}"}] for n, label in enumerate(labels)
    }
    conventions = {f["name"]: f["convention"].partition("; runs")[0] for f in found[labels[1]]}
    evaluation = {
        "labels": labels,
        "teacher": labels[0],
        "figures": found,
        "generations": generations,
        "conventions": conventions,
    }
    write_json(folder / "evaluation.json", evaluation)


def write_profile(folder: Path, before: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {"block_influence/layers/all": torch.rand(before["layers"], generator=generator)}
    scores["activation_l2/hidden/all"] = torch.rand(before["hidden"], generator=generator).exp()
    for layer in range(before["layers"]):
        for dim in ("mlp", "heads", "kv_heads"):
            draw = torch.randn(before[dim], generator=generator)
            scores[f"activation_l2/{dim}/{layer}"] = (2 * draw + layer / 5).exp()
            scores[f"random/{dim}/{layer}"] = torch.rand(before[dim], generator=generator)
    folder.mkdir(parents=True)
    save_file(scores, folder / "scores.safetensors")
    criteria = ["activation_l2", "random", "block_influence"]
    write_json(folder / "profile.json", {"fingerprint": "f" * 64, "criteria": criteria})


def make_plan(before: dict[str, int]) -> Plan:
    draw = random.Random(0)
    layers = [n for n in range(before["layers"]) if n != before["layers"] - 2]
    mlp = before["mlp"] * 3 // 4
    return Plan(
        model_type="llama",
        fingerprint="f" * 64,
        before=before,
        after={**before, "layers": len(layers), "mlp": mlp, "kv_heads": 1, "heads": 4},
        layers=layers,
        mlp={n: sorted(draw.sample(range(before["mlp"]), mlp)) for n in layers},
        kv_heads={n: [draw.randrange(2)] for n in layers},
        criterion="activation_l2",
    )


def write_manifest(folder: Path, stage: str, **extra: Any) -> None:
    made = {
        "stage": stage,
        "digest": "d1" * 32,
        "config": {"samples": 4},
        "inputs": {"model": "f" * 64},
        "figures": [{"name": "parameters", "value": 108800000.0}],
        "versions": {"regrow": "0.1.0", "torch": "2.13.0"},
        "machine": {"processor": "x86_64", "system": "Linux"},
        "seconds": 61.5,
        "finished": "2026-01-02T03:04:05Z",
        **extra,
    }
    write_json(folder / "manifest.json", made)


def write_metrics(path: Path, stage: str, steps: int = 200) -> None:
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        common = {"stage": stage, "step": step, "tokens": 2048 * step, "seconds": 7.0 * step}
        loss = 0.4 + 0.5 * math.exp(-step / 40) + draw.gauss(0, 0.03)
        rows.append({**common, "loss": loss, "learning_rate": 2e-4})
        if step % 25 == 0:
            rows.append({**common, "heldout_kl": 0.42 + 0.4 * math.exp(-step / 40)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_candidates(path: Path, name: str) -> None:
    shapes = [(name, {"mlp": 150}, 0.61), ("depth", {"layers": 5}, 0.9), ("mix", {"mlp": 170}, 0.5)]
    rows = [
        {
            "name": label,
            "sizes": sizes,
            "parameters": 108_000_000 + n * 300_000,
            "keep": 0.8 + n / 400,
            "kl": kl,
            "chosen": n == 2,
        }
        for n, (label, sizes, kl) in enumerate(shapes)
    ]
    write_json(path, rows)


def write_run(
    folder: Path,
    labels: tuple[str, ...] = ("teacher", "pruned", "repaired", "distilled"),
    words: str = "plain words",
    before: dict[str, int] = BEFORE,
) -> Path:
    """A run folder as `regrow run` leaves it; `words` go wherever a user's or model's text goes."""
    stages = folder / "stages"
    plan = make_plan(before)
    write_profile(stages / "01-profile", before)
    for name in ("02-prune", "02-prune-repaired", "03-distill"):
        write_manifest(stages / name, name.split("-")[1])
        plan.write(stages / name / "plan.json")
    write_manifest(stages / "01-profile", "profile", note=words)
    write_candidates(stages / "02-prune-repaired" / "candidates.json", words)
    write_metrics(folder / "metrics.jsonl", "03-distill")
    write_evaluation(stages / "04-evaluate", list(labels), words, f"answer: {words}")
    write_manifest(stages / "04-evaluate", "evaluate")
    (folder / "recipe.yaml").write_text(f"model: {words}\nstages: [profile]\n")
    return folder


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
    found = [str(a[name]) for _, a in page.tags for name in sources if name in a]
    return [place for place in found if not place.startswith("#")]


def test_every_section_is_there_in_order(page: Page) -> None:
    assert page.ids == SECTIONS
    targets = [a["href"] for tag, a in page.tags if tag == "a"]
    assert targets == [f"#{key}" for key in SECTIONS]


def test_the_headline_tells_the_result(run: Path, page: Page) -> None:
    expected = (
        "108.8 M of 134.5 M parameters kept (80.9%); perplexity (heldout) "
        "28.50 → 61.00 pruned → 47.00 repaired → 42.00 distilled; prefill 1.33× as fast"
    )
    assert headline(folders.read(run)) == expected
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
    assert len(page.figures) == len([a for _, a in page.tags if a.get("class") == "plot"]) == 13
    for found in page.figures.values():
        go.Figure(found)  # raises for an unknown property or a bad value
        for trace in found["data"]:
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


def test_embedded_json_comes_back_whole() -> None:
    value = {"</script>": ["<!--", "&lt;", "\u2028", 1.5]}
    text = str(embedded(value))
    assert json.loads(text) == value
    assert "<" not in text
    assert "&" not in text


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        ("stages/04-evaluate", {"result", "quality", "generations", "conventions"}),
        ("stages/01-profile", {"importance"}),
        ("stages/01-profile/scores.safetensors", {"importance"}),
        ("metrics.jsonl", {"training"}),
        ("stages/02-prune-repaired/candidates.json", {"candidates"}),
        ("recipe.yaml", set()),
    ],
)
def test_a_missing_piece_costs_its_sections_only(
    tmp_path: Path, gone: str, missing: set[str]
) -> None:
    folder = write_run(tmp_path / "run")
    place = folder / gone
    for path in [*place.glob("*"), place]:
        path.rmdir() if path.is_dir() else path.unlink()
    page = Page(report(folder, tmp_path / "page.html").read_text())
    assert page.ids == [key for key in SECTIONS if key not in missing]


def test_a_lone_evaluation_and_an_unfinished_run(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    write_evaluation(alone, ["one", "two"], "Hi", "there")
    write_manifest(alone, "evaluate")
    page = Page(report(alone).read_text())
    assert page.ids == ["result", "quality", "generations", "conventions", "provenance"]
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


def test_numbers_for_people() -> None:
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


def test_what_cannot_be_reported_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, run: Path, out: Path | None = None) -> None:
        with pytest.raises(UserError, match=match) as caught:
            report(run, out)
        assert "\n" not in str(caught.value)

    refused("holds no run: expected stages/", tmp_path / "nowhere")
    folder = write_run(tmp_path / "run")
    refused("is a folder: give --out the name", folder, tmp_path)
    (folder / "stages/04-evaluate/evaluation.json").write_text("{")
    refused("evaluation.json is no JSON", folder)
    assert not (folder / "report.html").exists()
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "regrow.stages.report.stage.find_spec",
        lambda name: None if name == "plotly" else real(name),
    )
    refused(r"pip install 'regrow\[report\]'", folder)
