"""Rounds of a recipe: `iterate` stands for the same stages several times, with smaller sizes.

A recipe keeps the expanded list of stages, so that everything else reads a flat list.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

NAME = "iterate"
STAGES = ("profile", "prune", "reconstruct", "distill")
"""The stages of a round, in this order. Every round has profile and prune."""
SMALLEST_STEP = 2 / 3
"""The least share of its parameters that a model keeps in one round."""


def expand(stages: Any) -> Any:
    """Replace each `iterate` in a list of stages by the stages of its rounds.

    Raises ValueError for an `iterate` without one list of sizes, and for sizes that do not shrink.
    """
    if not isinstance(stages, list):
        return stages
    return [each for entry in stages for each in _expanded(entry)]


def _expanded(entry: Any) -> Iterator[Any]:
    if not isinstance(entry, dict) or list(entry) != [NAME]:
        yield entry
        return
    fields = entry[NAME]
    if not isinstance(fields, dict) or not set(fields) <= set(STAGES):
        raise ValueError(f"{NAME}: give the fields of {', '.join(STAGES)}, and prune with sizes")
    for name in STAGES:
        if not isinstance(fields.get(name) or {}, dict):
            raise ValueError(f"{NAME}.{name}: give its fields as `key: value`")
    key, sizes = _sizes(fields.get("prune") or {})
    for number, size in enumerate(sizes):
        for name in STAGES:
            if name in fields or name == "profile":
                own = dict(fields.get(name) or {})
                if name == "prune":
                    own[key] = size
                yield {name: _of_round(name, own, number, len(sizes))}


def _sizes(prune: dict[str, Any]) -> tuple[str, list[Any]]:
    """The field of prune that has a list, and its value in each round."""
    lists = {key: value for key, value in prune.items() if isinstance(value, list)}
    if len(lists) != 1:
        raise ValueError(
            f"{NAME}.prune: give one field a list of sizes, one for each round, such as "
            f"keep_params: [0.8, 0.64] (lists given: {', '.join(lists) or 'none'})"
        )
    ((key, sizes),) = lists.items()
    numbers = all(isinstance(size, int | float) for size in sizes)
    if not sizes or not numbers or any(b >= a for a, b in pairwise(sizes)):
        raise ValueError(f"{NAME}.prune.{key}: each size must be below the one before ({sizes})")
    return (key, _ratios(sizes)) if key == "keep_params" else (key, sizes)


def _ratios(shares: list[float]) -> list[float]:
    """What each round keeps of the model before it, from shares of the first model."""
    ratios = [now / before for before, now in zip([1.0, *shares], shares, strict=False)]
    for before, now, ratio in zip([1.0, *shares], shares, ratios, strict=False):
        if ratio < SMALLEST_STEP - 1e-9:
            between = round((before * now) ** 0.5, 2)
            raise ValueError(
                f"{NAME}.prune.keep_params: the round from {before:g} to {now:g} removes more than "
                f"a third of the model: add a round between, such as {between:g}"
            )
    return [round(ratio, 6) for ratio in ratios]


def _of_round(name: str, fields: dict[str, Any], number: int, rounds: int) -> dict[str, Any]:
    """The fields of one round; a list of tokens has one number for each round."""
    tokens = fields.get("tokens")
    if not isinstance(tokens, list):
        return fields
    if len(tokens) != rounds:
        raise ValueError(
            f"{NAME}.{name}.tokens: {len(tokens)} numbers for {rounds} rounds: give one each"
        )
    return {**fields, "tokens": tokens[number]}
