"""Find the table of a model from its config and the class that transformers has for it.

A tiny copy of the config is built, one size after the other is changed, and the axes that change
with it get its name. Nothing is believed: every dimension is then cut in a tiny random model and
offered only if units that are zero could be removed. The result is kept on disk.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from regrow.families._derive import store
from regrow.families._derive.stock import UnsupportedError, explicit
from regrow.families._derive.tiny import Tiny, shrink
from regrow.families._rows import parts, rows
from regrow.families._table import Family

if TYPE_CHECKING:
    from regrow.families._derive.axes import Found
    from regrow.families._derive.find import Findings

WIDTHS = ("mlp", "expert_mlp", "heads", "kv_heads", "experts")


@dataclass(frozen=True)
class Derived:
    """A derived table, and what was proven of it on a tiny copy."""

    family: Family
    proven: tuple[str, ...]
    """Dimensions that can be cut; `family.refused` has the reasons for the others."""
    odd: dict[str, str]
    """What the model does that others do not, with the reason. `cache`: generation with a cache
    differs. `documents`: packed documents see each other."""


def derive(config: dict[str, Any]) -> Derived:
    """The table of a config's model, found and proven on a tiny copy of it.

    The result is kept in this process and on disk. Raises UnsupportedError with the reason for a
    model that no table can describe, and UserError for a config that has no class.
    """
    key = json.dumps(config, sort_keys=True, default=str)
    if key not in _known:
        try:
            _known[key] = store.remembered(
                "table", config, lambda: _derive(config), store.write_derived, store.read_derived
            )
        except UnsupportedError as error:
            _known[key] = str(error)
    known = _known[key]
    if isinstance(known, str):
        raise UnsupportedError(known)
    return known


_known: dict[str, Derived | str] = {}
"""By config the table, or why there is none."""


def _derive(config: dict[str, Any]) -> Derived:
    tiny = shrink(config)
    findings = store.remembered(
        "findings", tiny.config, lambda: _find(tiny), store.write_findings, store.read_findings
    )
    return _finish(config, tiny, findings)


def _find(tiny: Tiny) -> Findings:
    from regrow.families._derive.find import find

    return find(tiny)


def _finish(config: dict[str, Any], tiny: Tiny, findings: Findings) -> Derived:
    """The table for the sizes of the real config."""
    from regrow.families._derive.axes import of_templates
    from regrow.families._derive.table import assemble
    from regrow.families._derive.tiny import with_layers

    full = explicit(config)
    few = with_layers(full, tiny.per_layer, list(tiny.layers))
    found = copy.deepcopy(findings.found)
    if found.kv_heads_unused and full[found.keys["kv_heads"]] != full[found.keys["heads"]]:
        found.keys["kv_heads"] = found.keys["heads"]
    family = assemble(
        full, of_templates(few), tiny, tiny.kinds, found, findings.choice, findings.facts
    )
    if any(row.layers is not None and not row.layers[0] for row in family.tensors.values()):
        found.refused["layers"] = "no config key says which layers have which tensors"
    family = _fixed(family, full, found)
    refused = dict(found.refused)
    proven = tuple(dim for dim in findings.proven if dim not in refused)
    return Derived(replace(family, refused=refused), proven, findings.odd)


def _fixed(family: Family, config: dict[str, Any], found: Found) -> Family:
    """The table with fixed lengths for widths that cannot be cut, so nothing is measured there."""
    gone = {dim for dim in WIDTHS if dim in found.refused}
    if "kv_heads" not in gone and "kv_heads" in family.config_keys:
        gone.discard("heads")  # they are cut with their KV heads
    sizes = family.sizes(config)
    tensors = {
        name: replace(
            row,
            axes=tuple(
                rows(axis, sizes, row.unit) if gone & set(parts(axis)) else axis
                for axis in row.axes
            ),
        )
        for name, row in family.tensors.items()
    }
    return replace(family, tensors=tensors)


__all__ = ["Derived", "UnsupportedError", "derive"]
