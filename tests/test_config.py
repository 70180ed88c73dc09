"""Configs: an unknown key is told in one line with its place and the nearest valid one."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field, ValidationError, field_validator

from regrow.config import Config, parse
from regrow.errors import UserError, nearest


class Leaf(Config):
    """The innermost."""

    weight: float = Field(default=1.0, gt=0)
    """Weight."""
    name: str = ""
    """Name."""

    @field_validator("name")
    @classmethod
    def _short(cls, name: str) -> str:
        if len(name) > 5:
            raise ValueError("at most 5 letters")
        return name


class Branch(Config):
    """Holds leaves in every way."""

    leaf: Leaf = Leaf()
    """One."""
    leaves: tuple[Leaf, ...] = ()
    """Several."""
    maybe: Leaf | None = None
    """One or none."""
    by_name: dict[str, Leaf] = Field(default_factory=dict)
    """By name."""
    length: int = 8
    """A number."""


class Root(Config):
    """The outermost."""

    branch: Branch = Branch()
    """A branch."""
    needed: int
    """Must be given."""


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "top": ({"needed": 1, "brnch": {}}, "recipe.brnch: unknown key — did you mean 'branch'?"),
    "inside": (
        {"needed": 1, "branch": {"lenght": 3}},
        "recipe.branch.lenght: unknown key — did you mean 'length'?",
    ),
    "two deep": (
        {"needed": 1, "branch": {"leaf": {"wieght": 3}}},
        "recipe.branch.leaf.wieght: unknown key — did you mean 'weight'?",
    ),
    "in a list": (
        {"needed": 1, "branch": {"leaves": [{}, {"weigth": 2}]}},
        "recipe.branch.leaves.1.weigth: unknown key — did you mean 'weight'?",
    ),
    "in an optional": (
        {"needed": 1, "branch": {"maybe": {"nme": "x"}}},
        "recipe.branch.maybe.nme: unknown key — did you mean 'name'?",
    ),
    "in a dict": (
        {"needed": 1, "branch": {"by_name": {"branch": {"nam": "x"}}}},
        "recipe.branch.by_name.branch.nam: unknown key — did you mean 'name'?",
    ),
    "nothing near": (
        {"needed": 1, "branch": {"leaf": {"zzzz": 3}}},
        "recipe.branch.leaf.zzzz: unknown key; allowed: name, weight",
    ),
    "missing": ({}, "recipe.needed: Field required"),
    "range": (
        {"needed": 1, "branch": {"leaf": {"weight": -1}}},
        "recipe.branch.leaf.weight: Input should be greater than 0 (given: -1)",
    ),
    "kind": (
        {"needed": "x"},
        "recipe.needed: Input should be a valid integer, unable to parse string as an integer "
        "(given: 'x')",
    ),
    "our own check": (
        {"needed": 1, "branch": {"leaf": {"name": "abcdefgh"}}},
        "recipe.branch.leaf.name: at most 5 letters (given: 'abcdefgh')",
    ),
    "several at once": ({"needed": "x", "brnch": {}, "zzz": 1}, "recipe."),
}


@pytest.mark.parametrize("kind", CASES)
def test_bad_fields_are_refused_with_their_path(kind: str) -> None:
    fields, expected = CASES[kind]
    with pytest.raises(UserError) as raised:
        parse(Root, fields, "recipe")
    message = str(raised.value)
    assert message.startswith(expected) if kind == "several at once" else message == expected
    assert "\n" not in message


def test_a_long_bad_value_is_shortened_in_the_message() -> None:
    with pytest.raises(UserError) as raised:
        parse(Root, {"needed": ["x" * 10_000, "a\nb"]}, "recipe")
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)


def test_a_message_without_a_prefix_begins_with_the_key() -> None:
    with pytest.raises(UserError, match=r"^brnch: unknown key"):
        parse(Root, {"brnch": 1, "needed": 1}, "")


@pytest.mark.parametrize("value", [None, 3, "text", ["a"]])
def test_a_value_that_is_no_mapping_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"^recipe: "):
        parse(Root, value, "recipe")


def test_nested_fields_are_parsed() -> None:
    root = parse(Root, {"needed": 2, "branch": {"leaves": [{"weight": 3}]}}, "recipe")
    assert root.branch.leaves == (Leaf(weight=3),)


def test_configs_are_frozen() -> None:
    leaf = Leaf()
    with pytest.raises(ValidationError, match="frozen"):
        leaf.weight = 3.0  # type: ignore[misc]


def test_docstrings_are_the_help() -> None:
    assert Root.model_fields["needed"].description == "Must be given."


def test_equal_configs_have_equal_digests() -> None:
    """The same for equal fields, however they were given; another for any other value."""
    assert Leaf(weight=1).digest() == Leaf.model_validate({"weight": "1.0", "name": ""}).digest()
    assert Leaf(weight=2).digest() != Leaf().digest()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("keep_parms", "keep_params"), ("tokns", "tokens"), ("xyz", None), ("", None)],
)
def test_the_nearest_name_is_suggested(name: str, expected: str | None) -> None:
    hint = nearest(name, ["keep_params", "tokens", "multiple_of"])
    assert hint == (f" — did you mean {expected!r}?" if expected else "")
