"""Writes the data of examples/one_job.yaml: commands to a house, each with its exact answer.

    python examples/one_job_data.py --out runs/one-job/data

A row is `{"prompt": "switch the kitchen lamp off\\n", "completion": "TurnOff area=kitchen
domain=light"}`. The sentence patterns were written by the people of Home Assistant and come in the
package home-assistant-intents (Apache-2.0). The sentences are drawn from these patterns, with the
rooms, devices and things of one invented house, so they are made, not recorded. `train.jsonl` and
`test.jsonl` share no sentence pattern and no sentence. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from regrow.config import cache_folder
from regrow.data.packages import fetch

PATTERNS = "package:home-assistant-intents==2026.11.25/home_assistant_intents/data/en.json"
SHA256 = "65a7162518fffb15bd07590ff1c630bc45eedd5065738eeea96ce2f8d0cc02be"
AREAS = ["kitchen", "bedroom", "bathroom", "living room", "garage", "office", "hallway", "attic"]
FLOORS = ["first", "second", "ground", "top"]
DEVICES = {
    "climate": ["thermostat", "heat pump"],
    "cover": ["patio blind", "skylight", "garden gate"],
    "fan": ["ceiling fan", "tower fan"],
    "light": ["desk lamp", "reading light", "spotlight"],
    "lock": ["front door", "back door"],
    "media_player": ["tv", "radio", "soundbar"],
    "todo": ["work", "weekend"],
    "vacuum": ["robot", "dusty"],
    "valve": ["sprinkler", "water main"],
    "weather": ["london", "the coast"],
    "lawn_mower": ["grasshopper", "rover"],
    "": ["coffee machine", "heater", "desk lamp", "fridge", "night light", "printer"],
}
"""Names of devices by their kind; the last kind is for patterns that name none."""
ITEMS = ["milk", "eggs", "bread", "apples", "washing powder", "rice", "dog food", "olive oil"]
WORDS = {
    "area": AREAS,
    "floor": FLOORS,
    "shopping_list_item": ITEMS,
    "todo_list_item": ["call mum", "pay the rent", "water the plants", "book a flight"],
    "timer_name": ["pizza", "tea", "laundry", "nap"],
}
POLITE = ["please", "can you", "could you", "would you"]
TOKEN = re.compile(r"<[^>]+>|\{[^}]+\}|[()\[\]|;]|[^<>{}()\[\]|;]+")
TEST_EVERY = 5
"""One of so many patterns of an intent with the same slots is for the test."""


@dataclass(frozen=True)
class Pattern:
    """A sentence pattern, the intent that it expresses, and what it fixes."""

    text: str
    intent: str
    fixed: dict[str, str]
    """Slots that every sentence of the pattern has."""
    kinds: tuple[str, ...]
    """The kinds of device that `{name}` may be."""


class Grammar:
    """Draws sentences from patterns: (a|b), [optional], (first;second in any order), <rule>,
    {list:slot}."""

    def __init__(self, data: dict[str, Any], random: Random) -> None:
        self.rules: dict[str, str] = data["expansion_rules"]
        self.lists: dict[str, Any] = data["lists"]
        self.random = random

    def sentence(self, pattern: Pattern) -> tuple[str, dict[str, str]]:
        """A sentence and its slots."""
        slots = dict(pattern.fixed)
        text = self._drawn(pattern.text, pattern.kinds, slots)
        if self.random.random() < 0.2:
            text = f"{self.random.choice(POLITE)} {text}"
        return " ".join(text.split()).lower(), slots

    def can_draw(self, text: str) -> bool:
        """Whether all lists of a pattern have words: some take any text, such as a message."""
        names = re.findall(r"\{([^:}]+)", self._with_rules(text))
        known = {"name", *WORDS}
        return all(n in known or not self.lists.get(n, {}).get("wildcard") for n in names)

    def _with_rules(self, text: str) -> str:
        while re.search(r"<([^>]+)>", text):
            text = re.sub(r"<([^>]+)>", lambda match: self.rules[match[1]], text)
        return text

    def _drawn(self, text: str, kinds: tuple[str, ...], slots: dict[str, str]) -> str:
        tokens = TOKEN.findall(text)
        drawn, rest = self._group(tokens, kinds, slots, "")
        assert not rest, f"unbalanced pattern: {text}"
        return drawn

    def _group(
        self, tokens: list[str], kinds: tuple[str, ...], slots: dict[str, str], end: str
    ) -> tuple[str, list[str]]:
        """One of the alternatives up to `end`; only its slots are added."""
        choices: list[tuple[list[str], dict[str, str]]] = [([""], {})]
        while tokens and tokens[0] != end:
            token, tokens = tokens[0], tokens[1:]
            parts, own = choices[-1]
            if token == "|":
                choices.append(([""], {}))
            elif token == ";":
                parts.append("")
            elif token in "([":
                inner: dict[str, str] = {}
                text, tokens = self._group(tokens, kinds, inner, ")" if token == "(" else "]")
                if token == "(" or self.random.random() < 0.5:
                    parts[-1] += text
                    own.update(inner)
            else:
                parts[-1] += self._piece(token, kinds, own)
        parts, own = self.random.choice(choices)
        self.random.shuffle(parts)
        slots.update(own)
        return " ".join(parts), tokens[1:]

    def _piece(self, token: str, kinds: tuple[str, ...], slots: dict[str, str]) -> str:
        if token[0] == "<":
            return self._drawn(self.rules[token[1:-1]], kinds, slots)
        if token[0] != "{":
            return token
        name, _, slot = token[1:-1].partition(":")
        text, slots[slot or name] = self._word(name, kinds, slots)
        return text

    def _word(self, name: str, kinds: tuple[str, ...], slots: dict[str, str]) -> tuple[str, str]:
        """What is said, and what the slot gets."""
        if name == "name" or name in WORDS:
            words = DEVICES[self.random.choice(kinds)] if name == "name" else WORDS[name]
            said = self.random.choice(words)
            return said, said
        known = self.lists[name]
        if "range" in known:
            low, high = known["range"]["from"], known["range"]["to"]
            value = self.random.randrange(low, high + 1, known["range"].get("step", 1))
            return str(value), str(value * known["range"].get("multiplier", 1))
        value = self.random.choice(known["values"])
        value = value if isinstance(value, dict) else {"in": value, "out": value}
        return self._drawn(value["in"], kinds, slots), str(value["out"])


def patterns(data: dict[str, Any], grammar: Grammar) -> Iterator[tuple[bool, Pattern]]:
    """Each pattern, and whether it is for the test.

    Patterns of one intent with the same slots are said in different words; every TEST_EVERY-th of
    them is for the test.
    """
    by_slots: dict[tuple[str, str], list[Pattern]] = defaultdict(list)
    for intent, entry in data["intents"].items():
        if intent in ("HassGetState", "HassRespond", "HassNevermind"):
            continue
        for group in entry["data"]:
            context = group.get("requires_context", {}).get("domain", "")
            kinds = tuple([context] if isinstance(context, str) else context)
            kinds = tuple(kind for kind in kinds if kind in DEVICES) or ("",)
            fixed = {key: str(value) for key, value in group.get("slots", {}).items()}
            place = (intent, json.dumps([group["metadata"]["slot_combination"], fixed, kinds]))
            for text in filter(grammar.can_draw, group["sentences"]):
                by_slots[place].append(Pattern(text, intent.removeprefix("Hass"), fixed, kinds))
    for same in by_slots.values():
        for number, pattern in enumerate({each.text: each for each in same}.values()):
            yield number % TEST_EVERY == 1, pattern


def rows(drawn_from: list[Pattern], grammar: Grammar, count: int) -> list[dict[str, str]]:
    """`count` different sentences with their answers; every intent is drawn equally often.

    A sentence that can mean two things is left out.
    """
    by_intent: dict[str, list[Pattern]] = defaultdict(list)
    for pattern in drawn_from:
        by_intent[pattern.intent].append(pattern)
    found: dict[str, set[str]] = defaultdict(set)
    for _ in range(20 * count):
        pattern = grammar.random.choice(by_intent[grammar.random.choice(list(by_intent))])
        text, slots = grammar.sentence(pattern)
        found[text].add(answer(pattern.intent, slots))
        if len(found) == count:
            break
    return [
        {"prompt": f"{text}\n", "completion": next(iter(answers))}
        for text, answers in found.items()
        if len(answers) == 1
    ]


def answer(intent: str, slots: dict[str, str]) -> str:
    """The exact answer: the intent, then its slots by name."""
    return " ".join([intent, *(f"{name}={value}" for name, value in sorted(slots.items()))])


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for train and test")
    parser.add_argument("--train", type=int, default=8000, help="number of sentences")
    parser.add_argument("--test", type=int, default=500, help="number of sentences")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = json.loads(fetch(PATTERNS, SHA256, cache_folder()).read_text(encoding="utf-8"))
    grammar = Grammar(data, Random(arguments.seed))
    known = list(patterns(data, grammar))
    train = rows([each for is_test, each in known if not is_test], grammar, arguments.train)
    test = rows([each for is_test, each in known if is_test], grammar, arguments.test)
    sentences = {row["prompt"] for row in train}
    test = [row for row in test if row["prompt"] not in sentences]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, some in {"train": train, "test": test}.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (arguments.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{len(some):,} rows in {arguments.out / name}.jsonl")


if __name__ == "__main__":
    main()
