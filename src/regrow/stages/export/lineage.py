"""Where a model comes from and under which licence, as far as files say so: nothing is guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from regrow import manifest
from regrow.origin import gguf_of

RECIPE = "recipe.yaml"
PACKAGE = "package:"
FIRST_WORDS = {
    "apache license version 2.0": "apache-2.0",
    "mit license": "mit",
    "bsd 3-clause license": "bsd-3-clause",
    "gnu general public license version 3": "gpl-3.0",
    "llama 2 community license": "llama2",
    "meta llama 3 community license": "llama3",
    "llama 3.1 community license": "llama3.1",
    "llama 3.2 community license": "llama3.2",
    "llama 3.3 community license": "llama3.3",
    "gemma terms of use": "gemma",
}
"""What a licence file begins with, and the hub's name for it."""
TERMS = {
    "apache-2.0": "allows modified models and their redistribution, with notice of the changes",
    "mit": "allows modified models and their redistribution, with the copyright notice",
    "bsd-3-clause": "allows modified models and their redistribution, with the copyright notice",
    "cc-by-4.0": "allows adaptations, with attribution",
    "cc-by-sa-4.0": "allows adaptations under the same licence, with attribution",
    "cc-by-nc-4.0": "allows adaptations for non-commercial use only",
    "cc-by-nc-sa-4.0": "allows adaptations for non-commercial use only, under the same licence",
    "cc-by-nd-4.0": "does not allow sharing adaptations",
}
"""Whether models made from one of that licence may be shared, where its text is plain about it."""

TEXTS = {"/data/enwik8.gz": "GFDL (English Wikipedia of 2006)"}
"""Licences of texts that the project itself uses, by the end of their name in a package."""


@dataclass(frozen=True)
class Licence:
    """A licence by the hub's name for it, and where that stands; None when nothing says it."""

    id: str | None = None
    where: str = ""

    def __str__(self) -> str:
        return "unknown" if self.id is None else f"{self.id} ({self.where})"

    @property
    def terms(self) -> str:
        """Whether it allows a model made from this one; unknown is said to be unknown."""
        if self.id is None:
            return "unknown: ask whoever published the parent before you share this model"
        return TERMS.get(self.id, "read its text: regrow does not know its terms")


@dataclass(frozen=True)
class Lineage:
    """A model's parent, the text and the stages that it was made with."""

    name: str
    parent: str
    licence: Licence
    sources: list[dict[str, Any]] = field(default_factory=list)
    """The recipe's sources of text."""
    recipe: str = ""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Manifests by the stage's folder, in order."""
    made: bool = True
    """Whether regrow made the model, rather than found it."""


def lineage_of(folder: Path, given: str | None = None) -> Lineage:
    """What is known of the model in `folder`, which was named `given`.

    A folder that stands in a run has its recipe and its stages; one that a single stage wrote, its
    manifest; any other is its own parent.
    """
    run = _run_of(folder)
    if run is not None:
        recipe = (run / RECIPE).read_text()
        fields = yaml.safe_load(recipe)
        parent, sources = str(fields["model"]), _sources(fields.get("data"))
        name = run.resolve().name
        stages = _stages(run, folder.resolve())
        return Lineage(name, parent_name(parent), licence_of(parent), sources, recipe, stages)
    found = manifest.read(folder)
    if found is not None and "stage" in found:
        name = folder.resolve().name
        return Lineage(name, "not recorded", Licence(), stages={name: found})
    parent = given or str(folder)
    return Lineage(short_name(parent), parent_name(parent), licence_of(parent, folder), made=False)


def licence_of(model: str, folder: Path | None = None) -> Licence:
    """The licence that a model's own files name: its card, its GGUF keys, its licence file."""
    path = gguf_of(model)
    if path is not None:
        return _of_gguf(path)
    folder = folder or Path(model).expanduser()
    if not folder.is_dir():
        return Licence()
    return _of_card(folder) or _of_file(folder) or Licence()


def _of_card(folder: Path) -> Licence | None:
    path = folder / "README.md"
    if not path.exists():
        return None
    front = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8", errors="replace"), re.S)
    fields = yaml.safe_load(front[1]) if front else None
    named = fields.get("license") if isinstance(fields, dict) else None
    if not isinstance(named, str) or named in ("unknown", "other"):
        return None
    return Licence(named, "said by its model card")


def _of_file(folder: Path) -> Licence | None:
    for path in sorted(folder.glob("LICENSE*")):
        words = " ".join(path.read_text(encoding="utf-8", errors="replace").lower().split()[:24])
        plain = words.replace(",", "")
        for first, name in FIRST_WORDS.items():
            if plain.startswith(first):
                return Licence(name, f"its file {path.name} begins so")
    return None


def _of_gguf(path: Path) -> Licence:
    from gguf import GGUFReader

    found = GGUFReader(path).fields.get("general.license")
    if found is None:
        return Licence()
    return Licence(str(found.contents()).lower(), f"general.license of {path.name}")


def _run_of(folder: Path) -> Path | None:
    for above in list(folder.resolve().parents)[:2]:
        if (above / RECIPE).exists() and (above / "stages").is_dir():
            return above
    return None


def _sources(data: Any) -> list[dict[str, Any]]:
    given = data.get("sources", []) if isinstance(data, dict) else data
    given = given if isinstance(given, list) else [given]
    return [{"source": each} if isinstance(each, str) else each for each in given if each]


def _stages(run: Path, model: Path) -> dict[str, dict[str, Any]]:
    """Manifests of the stages that led to `model`, and of evaluations, which measure it later."""
    found = {}
    for path in sorted(run.glob("stages/*")):
        made = manifest.read(path)
        later = model.parent.name == "stages" and path.name > model.name
        if made is not None and (not later or made.get("stage") == "evaluate"):
            found[path.name] = made
    return found


def short_name(model: str) -> str:
    """A model's name without the path that it lies under, which is nobody else's business."""
    if model.startswith(PACKAGE):
        return model.removeprefix(PACKAGE)
    path = Path(model).expanduser()
    if not path.exists():
        return model.rpartition("/")[2]
    return path.stem if path.is_file() else path.resolve().name


def text_licence(source: str) -> str | None:
    """The licence of a source of text, where the project knows it."""
    if not source.startswith(PACKAGE):
        return None
    return next((licence for end, licence in TEXTS.items() if source.endswith(end)), None)


def parent_name(model: str) -> str:
    """A parent as a reader can find it: a hub id or package as it stands, else the name alone."""
    public = model.startswith(PACKAGE) or not Path(model).expanduser().exists()
    return model if public else short_name(model)
