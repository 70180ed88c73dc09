"""The page in a real browser, when there is one: drawn, silent, and asking the network for nothing.

Chromium alone, headless, in an empty profile.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from report_run import add_benchmarks, write_metrics, write_run

from regrow.stages.report import ReportConfig
from regrow.stages.report.stage import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
    *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000", "--dump-dom"),
)
HOSTILE = "<script>alert(1)</script><img src=http://127.0.0.1:9/x onerror=alert(2)>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page."""

    dom: str
    console: list[str]
    requests: list[str]

    @property
    def drawn(self) -> int:
        """Plots with their axes in place."""
        return len(re.findall(r'class="(?:js-plotly-plot|plot js-plotly-plot)', self.dom))


def opened(page: Path, folder: Path, width: int = 1280) -> Seen:
    log = folder / "net.json"
    done = subprocess.run(
        [
            *(str(CHROMIUM), *QUIET, f"--user-data-dir={folder / 'profile'}"),
            *(f"--log-net-log={log}", f"--window-size={width},900", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    started = [line for line in log.read_text().splitlines() if '"initiator":' in line]
    # What chromium asks for by itself (the time, updates) has no page as its origin.
    requests = "\n".join(line for line in started if "not an origin" not in line)
    return Seen(done.stdout, console, re.findall(r'"url":"((?:https?|wss?)://[^"]*)"', requests))


def full_run(folder: Path, words: str = "plain words") -> Path:
    labels = ("teacher", f"pruned {words}", "repaired", "distilled")
    write_run(folder, labels, words)
    add_benchmarks(folder)
    path = folder / "stages" / "04-evaluate" / "evaluation.json"
    path.write_text(path.read_text().replace("arc_easy", json.dumps(words)[1:-1]))
    feature_losses = {"forward_kl": 1.0, words: 2.0}
    write_metrics(folder / "metrics.jsonl", "03-distill", feature_losses=feature_losses)
    return folder


def test_the_browser_log_shows_errors(tmp_path: Path) -> None:
    """So that silence below means something."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<p>here</p><script>console.error('wrong'); fetch('http://127.0.0.1:9/').catch(() => 0)"
        "</script>"
    )
    log = opened(page, tmp_path)
    assert "here" in log.dom
    assert any("wrong" in line for line in log.console)
    assert "http://127.0.0.1:9/" in log.requests


@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_is_drawn_without_errors(tmp_path: Path, width: int) -> None:
    page = report(full_run(tmp_path / "run"), tmp_path / "page.html")
    log = opened(page, tmp_path, width)
    assert log.console == []
    assert log.requests == []
    assert log.drawn == page.read_text().count('class="plot"') > 20
    for words in ("Quality against size and speed", "lambada_openai", "time to first token"):
        assert words in log.dom
    for words in ("Pareto", "held-out KL", "What it cost", "0.360 ± 0.015", "90.0% ± 2.0% kept"):
        assert words in log.dom


def test_hostile_names_are_drawn_as_text(tmp_path: Path) -> None:
    runs = [full_run(tmp_path / f"{n}<b>x", HOSTILE) for n in range(2)]
    page = report(runs, tmp_path / "page.html", ReportConfig(title=HOSTILE))
    log = opened(page, tmp_path)
    assert log.console == []
    assert log.requests == []
    assert log.drawn > 10
    assert not re.search(r"<(img|b)\b", re.sub(r"<script.*?</script>", "", log.dom, flags=re.S))
    assert "&lt;script&gt;alert(1)" in log.dom
