"""The teacher's licence against the intended use of the student; no legal advice."""

from __future__ import annotations

from typing import Any, NamedTuple

from regrow.checkpoint.licence import Licence, licence_of, of_card, of_text
from regrow.checkpoint.resolve import gguf_of
from regrow.stages.advise.config import Use
from regrow.stages.advise.source import Source
from regrow.stages.advise.tables import table

WORDS = {
    "yes": "allows it",
    "conditions": "allows it under conditions",
    "no": "does not allow it",
    "unknown": "is unknown here",
}


class Permission(NamedTuple):
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


def licence(source: Source, use: Use) -> Permission:
    """The licence of a model by its card, its LICENSE file or its GGUF keys, and what it allows."""
    found = of_card(source.card) or of_text(source.licence, "LICENSE")
    if found is None:
        found = licence_of(source.name) if gguf_of(source.name) is not None else Licence()
    name = (found.id or "").lower()
    known: dict[str, Any] | None = table("licences").get(name)
    if known is None:
        return Permission(name, "unknown", (), "")
    return Permission(name, str(known[use]), tuple(known["read"]), str(known["source"]))
