"""The sizes of a quantized model."""

from __future__ import annotations

import torch

from regrow.calibration.modules import WEIGHT
from regrow.checkpoint import Checkpoint
from regrow.families import Family
from regrow.plan import stored_plans
from regrow.quantization.formats import Scheme
from regrow.stage_dir import Figure


def sizes(
    before: Checkpoint, after: Checkpoint, family: Family, chosen: dict[str, Scheme]
) -> list[Figure]:
    """Bytes, bits per weight, and ratios to the model before quantization and before pruning."""
    old, new = (sum(map(c.bytes, c.names())) for c in (before, after))
    shapes = [(before.shapes[module + WEIGHT], scheme) for module, scheme in chosen.items()]
    weights = sum(rows * columns for (rows, columns), _ in shapes)
    bits = 8 * sum(scheme.type.bytes(*shape) for shape, scheme in shapes)
    parameters = family.count(before.config)
    figures = [
        Figure(name="bytes before", value=old, unit="bytes"),
        Figure(name="bytes", value=new, unit="bytes"),
        Figure(name="bits per quantized weight", value=bits / weights, unit="bits", n=weights),
        Figure(name="bits per parameter", value=8 * new / parameters, unit="bits", n=parameters),
        Figure(name="times smaller", value=old / new),
    ]
    ancestor = _ancestor_parameters(before, family)
    if ancestor is not None:
        dtype = getattr(torch, before.main_dtype)
        convention = f"{ancestor:,} parameters in {before.main_dtype}, before pruning, ÷ bytes"
        ratio = dtype.itemsize * ancestor / new
        name = "times smaller than the first"
        figures.append(Figure(name=name, value=ratio, convention=convention))
    return figures


def _ancestor_parameters(checkpoint: Checkpoint, family: Family) -> int | None:
    """Parameters of the model before its first pruning, read from the plan in its folder."""
    first = next(stored_plans(checkpoint.folder), None)
    return None if first is None else family.count(checkpoint.config, first.before)
