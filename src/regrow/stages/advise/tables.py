"""The tables beside this module: evidence, families of models in several sizes, licences."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from regrow.cost.model import ModelSize

FOLDER = Path(__file__).parent
DIMENSIONS = ("layers", "hidden", "mlp", "heads", "kv_heads", "head_dim", "vocab")

SIMILAR = 0.1
"""A cut is similar if it keeps at most this much less of the parameters."""
Points = tuple[float, float]
"""Lowest and highest loss in points of a benchmark of 100."""


class Evidence(NamedTuple):
    """A measured loss and where it is from."""

    points: Points
    text: str
    source: str


class Sibling(NamedTuple):
    """A smaller model of the same family of models."""

    name: str
    size: ModelSize
    evidence: Evidence | None
    """Its loss against the larger one, if both have published scores."""


@cache
def table(name: str) -> dict[str, Any]:
    """The content of `name`.yaml."""
    fields: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    return fields


def of_format(bits: float) -> Evidence:
    """The loss of a storage format with this number of bits for each weight of a layer."""
    row = next(row for row in table("evidence")["formats"] if row["bits"] <= bits)
    low, high = row["points"]
    return Evidence((low, high), row["text"], row["source"])


def of_pruning(keep: float, tokens: float) -> Evidence | None:
    """The loss of pruning and distillation: the nearest measurement that is no milder.

    Its cut is as deep, or nearly; its tokens are no more. Measurements of a similar cut come first.
    None if there is none.
    """
    rows = table("evidence")["pruned"]
    able = [row for row in rows if row["keep"] <= keep + 0.02 and row["tokens"] <= tokens]
    if not able:
        return None
    similar = [row for row in able if row["keep"] >= keep - SIMILAR]
    best = max(similar or able, key=lambda row: (row["tokens"], row["keep"]))
    low, high = best["points"]
    text = f"{best['text']}, after {best['tokens']:,} tokens with {best['keep']:.0%} kept"
    return Evidence((low, high), text, best["source"])


def siblings(size: ModelSize) -> list[Sibling]:
    """Smaller models of the same family of models, the largest first; none for other models."""
    family = table("siblings").get(size.config["model_type"])
    if family is None:
        return []
    own = next((row for row in family["models"].values() if _is(size, row)), None)
    if own is None:
        return []
    found = []
    for name, row in family["models"].items():
        smaller = _size(size, row)
        if smaller.parameters < size.parameters:
            found.append(Sibling(name, smaller, _between(own, row, family)))
    return sorted(found, key=lambda each: -each.size.parameters)


def _is(size: ModelSize, row: dict[str, Any]) -> bool:
    return all(size.sizes[dim] == row[dim] for dim in ("layers", "hidden", "mlp", "vocab"))


def _size(size: ModelSize, row: dict[str, Any]) -> ModelSize:
    resized = size.resized(**{dim: row[dim] for dim in DIMENSIONS})
    return ModelSize({**resized.config, "tie_word_embeddings": row["tied"]})


def _between(own: dict[str, Any], row: dict[str, Any], family: dict[str, Any]) -> Evidence | None:
    if "points" not in own or "points" not in row:
        return None
    lost = round(own["points"] - row["points"], 1)
    text = f"MMLU {row['points']} instead of {own['points']}"
    return Evidence((lost, lost), text, family["points_source"])
