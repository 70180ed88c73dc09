"""Keep derived tables and findings in the cache folder, as JSON, so that each is made once.

A file's name is a digest of what it was made from and of the code that made it: the config, this
package, and the versions of transformers and torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from regrow.config import cache_folder
from regrow.families._rows import LayerRule, Tensor
from regrow.families._table import Family

if TYPE_CHECKING:
    from regrow.families._derive import Derived
    from regrow.families._derive.find import Findings

Value = TypeVar("Value")
IGNORED = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of the code and the libraries that make tables."""
    seen = hashlib.sha256(f"{version('transformers')} {version('torch')}".encode())
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *here.parent.glob("_*.py")]):
        seen.update(path.read_bytes())
    return seen.hexdigest()


def remembered(
    kind: str,
    config: dict[str, Any],
    make: Callable[[], Value],
    write: Callable[[Value], Any],
    read: Callable[[Any], Value],
) -> Value:
    """What `make` returns for a config, read from the cache folder if it was made before.

    A file that cannot be read or written is no error: the value is made again.
    """
    named = {key: value for key, value in config.items() if key not in IGNORED}
    text = json.dumps([kind, named, _code()], sort_keys=True, default=str)
    path = cache_folder() / "families" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return read(json.loads(path.read_text(encoding="utf-8")))
    value = make()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(write(value)), encoding="utf-8")
        new.replace(path)
    return value


def write_derived(derived: Derived) -> dict[str, Any]:
    """A derived table as JSON values."""
    family = {
        field.name: getattr(derived.family, field.name)
        for field in dataclasses.fields(Family)
        if field.name != "tensors"
    }
    tensors = {name: dataclasses.asdict(row) for name, row in derived.family.tensors.items()}
    return {"family": family, "tensors": tensors, "proven": derived.proven, "odd": derived.odd}


def read_derived(fields: dict[str, Any]) -> Derived:
    """The derived table in JSON values that `write_derived` made."""
    from regrow.families._derive import Derived

    family = {key: _tuples(value) for key, value in fields["family"].items()}
    tensors = {name: _row(row) for name, row in fields["tensors"].items()}
    return Derived(Family(tensors=tensors, **family), tuple(fields["proven"]), fields["odd"])


def _tuples(value: Any) -> Any:
    """The values of a table's field: lists in it were tuples."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return value


def _row(fields: dict[str, Any]) -> Tensor:
    axes = tuple(tuple(axis) if isinstance(axis, list) else axis for axis in fields["axes"])
    rule = fields["layers"]
    if isinstance(rule, list):
        rule = LayerRule(rule[0], tuple(rule[1]))
    return Tensor(**{**fields, "axes": axes, "layers": rule})


def write_findings(findings: Findings) -> dict[str, Any]:
    """Findings as JSON values."""
    fields = dataclasses.asdict(findings)
    fields["found"]["per_head"] = sorted(findings.found.per_head)
    fields["facts"]["norms"] = sorted(findings.facts.norms)
    del fields["found"]["layouts"]
    return fields


def read_findings(fields: dict[str, Any]) -> Findings:
    """The findings in JSON values that `write_findings` made."""
    from regrow.families._derive.axes import Found
    from regrow.families._derive.find import Findings
    from regrow.families._derive.table import Facts

    found = {**fields["found"], "per_head": frozenset(map(tuple, fields["found"]["per_head"]))}
    facts = {key: _tuples(value) for key, value in fields["facts"].items()}
    facts["norms"] = frozenset(facts["norms"])
    choice = {
        name: tuple(None if lay is None else (tuple(lay[0]), bool(lay[1])) for lay in axes)
        for name, axes in fields["choice"].items()
    }
    return Findings(Found(**found), choice, Facts(**facts), tuple(fields["proven"]), fields["odd"])
