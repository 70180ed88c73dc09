"""Builds the documentation as a site with Zensical, and checks its links.

    pip install -e '.[docs]'
    python docs/site.py --out site

The pages keep their places in the repository, because they link to each other, to examples and to
results by relative paths. This script copies the pages, and the files that they link to, into one
folder, and builds that folder in strict mode.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "benchmarks/README.md")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
CHAPTERS: dict[str, tuple[str, ...]] = {
    "Start": ("README.md", "docs/tutorial.md", "docs/concepts.md", "docs/advise.md"),
    "Make": (
        *("docs/recipes.md", "docs/which-criterion.md", "docs/teaching.md"),
        *("docs/answers.md", "docs/one-job.md"),
        *(
            "docs/quantize.md",
            "docs/sparsity.md",
            "docs/learned-masks.md",
            "docs/families.md",
            "docs/clusters.md",
        ),
    ),
    "Prove and publish": (
        *("docs/evaluate.md", "docs/report.md", "docs/export.md", "docs/publish.md"),
        "benchmarks/README.md",
    ),
    "Look up": ("docs/reference.md", "docs/how-it-works.md", "docs/architecture.md", "docs/log.md"),
    "Extend": (
        *("CONTRIBUTING.md", "docs/add-a-stage.md", "docs/add-a-criterion.md"),
        *("docs/add-a-loss.md", "docs/add-a-metric.md", "docs/add-a-family.md", "CHANGELOG.md"),
    ),
}
"""The navigation. A page that is not in it is added to “Look up”."""
CONFIG = """[project]
site_name = "regrow"
site_description = "Make a smaller language model out of a large one, and prove that it is good."
docs_dir = "pages"
site_dir = "site"
use_directory_urls = false
nav = {nav}

[project.theme]
language = "en"
font = false
features = ["navigation.sections", "navigation.footer", "search.highlight", "content.code.copy"]

[[project.theme.palette]]
media = "(prefers-color-scheme: light)"
scheme = "default"

[[project.theme.palette]]
media = "(prefers-color-scheme: dark)"
scheme = "slate"
"""


def main() -> None:
    """Build the site into --out; exit with 1 for a broken link."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the site")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        collect(work / "pages")
        (work / "zensical.toml").write_text(CONFIG.format(nav=navigation(chapters(pages()))))
        tool = Path(sys.executable).with_name("zensical")
        done = subprocess.run([str(tool), "build", "--clean", "--strict"], cwd=work)
        if done.returncode:
            sys.exit(done.returncode)
        broken = broken_links(work / "site")
        shutil.rmtree(arguments.out, ignore_errors=True)
        shutil.copytree(work / "site", arguments.out)
    if broken:
        sys.exit("broken links:\n" + "\n".join(broken))


def pages() -> list[str]:
    """The paths of all pages, relative to the repository."""
    found = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    return sorted(str(path.relative_to(ROOT)) for path in found)


def chapters(paths: list[str]) -> dict[str, list[str]]:
    """The pages of each chapter of the navigation; every page is in one of them."""
    placed = {path for names in CHAPTERS.values() for path in names}
    found = {title: [name for name in names if name in paths] for title, names in CHAPTERS.items()}
    found["Look up"] += [path for path in paths if path not in placed]
    return found


def navigation(of: dict[str, list[str]]) -> str:
    """The chapters as a TOML value."""
    entries = [f"  {{ {json.dumps(title)} = {json.dumps(names)} }}" for title, names in of.items()]
    return "[\n" + ",\n".join(entries) + ",\n]"


def collect(folder: Path) -> None:
    """Copy all pages, and each file of the repository that one of them links to."""
    for name in pages():
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        _copy(page, folder)
        for link in LINK.findall(text):
            target = (page.parent / unquote(link)).resolve()
            if target.is_file() and target.is_relative_to(ROOT):
                _copy(target, folder)


def _copy(path: Path, folder: Path) -> None:
    target = folder / path.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note href and src, id and name."""
        for key, value in attrs:
            if value and key in ("href", "src"):
                self.links.append(value)
            elif value and key in ("id", "name"):
                self.anchors.add(value)


def broken_links(site: Path) -> list[str]:
    """Links inside a built site that lead to no file, or to no anchor of a page."""
    found = {}
    for path in site.rglob("*.html"):
        found[path.resolve()] = Links()
        found[path.resolve()].feed(path.read_text(encoding="utf-8"))
    broken = []
    for path, page in found.items():
        for link in page.links:
            if re.match(r"[a-z]+:|//", link) or path.name == "404.html":
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (path.parent / name).resolve() if name else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
            elif anchor and target in found and anchor not in found[target].anchors:
                broken.append(f"{path.relative_to(site.resolve())}: {link} (no such heading)")
    return broken


if __name__ == "__main__":
    main()
