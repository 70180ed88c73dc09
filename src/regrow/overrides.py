"""`--set key=value`: change one field of a recipe before it is checked."""

from __future__ import annotations

from typing import Any

import yaml

from regrow.errors import UserError


def override(fields: dict[str, Any], given: str) -> None:
    """Set, in place, one dotted key of nested dicts and lists: `stages.prune.keep_params=0.7`.

    List positions are numbers; a stage may be named instead, for the first of that name. Raises
    UserError for what is no key=value and for a place that is not there.
    """
    key, equals, value = given.partition("=")
    if not equals or not key:
        raise UserError(f"--set {given}: write key=value, for instance data.seed=1")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {given}: {value!r} is no YAML value; quote it") from None
    *path, last = key.split(".")
    place: Any = fields
    for part in path:
        place = _enter(place, part, given)
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise UserError(f"--set {given}: there is no {key} in the recipe")


def _enter(place: Any, part: str, given: str) -> Any:
    if isinstance(place, list):
        number = int(part) if part.isdigit() else _first_stage(place, part)
        if number is not None and number < len(place):
            return _entered_stage(place, number, part)
    elif isinstance(place, dict):
        if not isinstance(place.get(part), dict | list):
            place[part] = {}
        return place[part]
    raise UserError(f"--set {given}: the recipe has no {part!r} there")


def _first_stage(stages: list[Any], name: str) -> int | None:
    named = (n for n, entry in enumerate(stages) if entry == name or _is_stage(entry, name))
    return next(named, None)


def _is_stage(entry: Any, name: str) -> bool:
    return isinstance(entry, dict) and name in entry


def _entered_stage(stages: list[Any], number: int, part: str) -> Any:
    """The entry at `number`, or the fields of the stage `part` there; a bare name gets fields."""
    if isinstance(stages[number], str):
        stages[number] = {stages[number]: {}}
    entry = stages[number]
    if not _is_stage(entry, part):
        return entry
    if not isinstance(entry[part], dict):
        entry[part] = {}
    return entry[part]
