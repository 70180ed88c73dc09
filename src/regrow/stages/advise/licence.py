"""The teacher's licence against the intended use of the student; no legal advice."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from regrow.checkpoint.licence import licence_of
from regrow.checkpoint.resolve import gguf_of
from regrow.stages.advise.config import Use
from regrow.stages.advise.source import Source
from regrow.stages.advise.tables import table

TITLES = {
    "apache license": "apache-2.0",
    "mit license": "mit",
    "llama 2 community license": "llama2",
    "meta llama 3 community license": "llama3",
    "llama 3.1 community license": "llama3.1",
    "llama 3.2 community license": "llama3.2",
    "llama 3.3 community license": "llama3.3",
    "gemma terms of use": "gemma",
    "qwen research license": "qwen-research",
    "tongyi qianwen license": "qwen",
}
"""Titles in the first lines of a LICENSE file."""
WORDS = {
    "yes": "allows it",
    "conditions": "allows it under conditions",
    "no": "does not allow it",
    "unknown": "is unknown here",
}


class Licence(NamedTuple):
    """A licence, and what it says about a use."""

    name: str
    """Its identifier; empty if the model names none."""
    allows: str
    """`yes`, `conditions`, `no` or `unknown`."""
    read: tuple[str, ...]
    """What to read before."""
    source: str

    def lines(self, use: Use) -> list[str]:
        """What to print."""
        if not self.name:
            return [
                "licence: unknown (neither the model card nor a LICENSE file names one): read the "
                "page of the model before anything else"
            ]
        words = f"licence: {self.name} {WORDS[self.allows]} ({use} use)"
        if self.allows == "unknown":
            return [f"{words}: read its text, and add it to licences.yaml"]
        return [words, *(f"  read: {each}" for each in self.read), f"  source: {self.source}"]


def licence(source: Source, use: Use) -> Licence:
    """The licence of a model by its card, its LICENSE file or its GGUF keys, and what it allows."""
    name = of_card(source.card) or of_file(source.licence)
    if not name and gguf_of(source.name) is not None:
        name = (licence_of(source.name).id or "").lower()
    known: dict[str, Any] | None = table("licences").get(name)
    if known is None:
        return Licence(name, "unknown", (), "")
    return Licence(name, str(known[use]), tuple(known["read"]), str(known["source"]))


def of_card(card: str) -> str:
    """The licence in the metadata of a model card; empty if there is none."""
    match = re.match(r"\s*---\s*\n(.*?)\n---", card, re.DOTALL)
    if match is None:
        return ""
    try:
        fields = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return ""
    if not isinstance(fields, dict):
        return ""
    name = str(fields.get("license") or "").lower()
    return str(fields.get("license_name") or "other").lower() if name == "other" else name


def of_file(text: str) -> str:
    """The licence of a LICENSE file by its title; empty if it is not a known one."""
    head = " ".join(text.lower().split())[:400]
    return next((name for title, name in TITLES.items() if title in head), "")
