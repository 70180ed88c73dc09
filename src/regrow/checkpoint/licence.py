"""The licence of a model, as far as its own files name one; nothing is guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from regrow.checkpoint.resolve import gguf_of

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
    "qwen research license": "qwen-research",
    "tongyi qianwen license": "qwen",
}
"""The hub's name of a licence by the first words of its text."""
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
"""Whether a licence allows sharing modified models, for licences whose text is clear about it."""
ONLY_DERIVED = ("llama2", "llama3")
"""Licences that forbid to improve other models than those derived from this one by its answers."""


@dataclass(frozen=True)
class Licence:
    """A licence: the hub's name for it, None if unknown, and the place where it is documented."""

    id: str | None = None
    source: str = ""
    other: bool = False
    """Whether the hub has no identifier of its own for it (`license: other` in the card)."""

    def __str__(self) -> str:
        return "unknown" if self.id is None else f"{self.id} ({self.source})"

    def metadata(self) -> dict[str, str]:
        """The licence as the hub's metadata of a model card; empty if it is unknown."""
        if self.id is None:
            return {}
        return {"license": "other", "license_name": self.id} if self.other else {"license": self.id}

    @property
    def terms(self) -> str:
        """A sentence on whether the licence allows derived models, or that this is unknown."""
        if self.id is None:
            return "unknown: ask whoever published the parent before you share this model"
        return TERMS.get(self.id, "read its text: regrow does not know its terms")


def licence_of(model: str, folder: Path | None = None) -> Licence:
    """The licence that a model's own files name: its GGUF keys, its card or its licence file."""
    path = gguf_of(model)
    if path is not None:
        return _of_gguf(path)
    folder = folder or Path(model).expanduser()
    if not folder.is_dir():
        return Licence()
    card = of_card(_text(folder / "README.md"))
    texts = ((path.name, _text(path)) for path in sorted(folder.glob("LICENSE*")))
    return card or next(filter(None, (of_text(text, name) for name, text in texts)), Licence())


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def of_card(text: str) -> Licence | None:
    """The licence in the metadata of a model card; None if there is none."""
    front = re.match(r"\s*---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        fields = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    if not isinstance(fields, dict):
        return None
    other = fields.get("license") == "other"
    named = fields.get("license_name" if other else "license")
    if not isinstance(named, str) or named in ("unknown", "other"):
        return None
    return Licence(named, "from its model card", other)


def of_text(text: str, name: str) -> Licence | None:
    """The licence of a licence file, by its first words; None if it is not a known one."""
    words = text.lower().replace(",", "").replace("#", "").split()
    opening = " ".join(words[:24])
    for first, licence in FIRST_WORDS.items():
        if opening.startswith(first):
            return Licence(licence, f"recognised from its file {name}")
    return None


def _of_gguf(path: Path) -> Licence:
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get("general.license")
    if field is None:
        return Licence()
    return Licence(str(field.contents()).lower(), f"general.license of {path.name}")
