"""The base of every config: frozen, strict, documented by its fields' docstrings."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from regrow.errors import UserError, nearest


class Config(BaseModel):
    """A frozen set of fields; an unknown key is an error, a field's docstring is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def digest(self) -> str:
        """SHA-256 of the fields' canonical JSON, as hex."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


ConfigT = TypeVar("ConfigT", bound=Config)


def parse(kind: type[ConfigT], fields: Any, where: str) -> ConfigT:
    """Validate `fields` as a `kind`; raises UserError, one line with the place and the mend."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
        if first["type"] == "extra_forbidden":
            allowed = _fields_at(kind, first["loc"][:-1])
            name = str(first["loc"][-1])
            hint = nearest(name, allowed) or f"; allowed: {', '.join(sorted(allowed))}"
            raise UserError(f"{path}: unknown key{hint}") from None
        raise UserError(f"{path}: {reason(first)}") from None


def reason(error: ErrorDetails) -> str:
    """What a validation error says, and the value, unless that is all of a config's fields."""
    message = error["msg"].removeprefix("Value error, ")
    of_all = error["type"] == "value_error" and isinstance(error["input"], dict)
    if error["type"] == "missing" or of_all:
        return message
    return f"{message} (given: {_short(error['input'])})"


def _short(value: Any) -> str:
    """How `value` was written, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


def _fields_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the config that `path` leads to, walking through lists and unions."""
    for part in path:
        if isinstance(part, str) and part in kind.model_fields:
            inner = _config_inside(kind.model_fields[part].annotation)
            if inner is not None:
                kind = inner
    return list(kind.model_fields)


def _config_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _config_inside(argument)
        if found is not None:
            return found
    return None
