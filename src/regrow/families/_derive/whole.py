"""Prove all cuts of a table together: on disk, with the stock reader, and with a cache."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from regrow.errors import reason_of
from regrow.families._cut import cut
from regrow.families._derive.modules import trace
from regrow.families._derive.plans import plan_for
from regrow.families._derive.prove import (
    ROUNDING,
    NotProvenError,
    Subject,
    after_of,
    cut_config_of,
    distance,
    logits,
    student_of,
)
from regrow.families._derive.stock import silent
from regrow.families._table import Family


@torch.no_grad()
def prove_whole(family: Family, subject: Subject, dims: Iterable[str]) -> dict[str, str]:
    """Cut all dimensions at once, save, reopen with the stock class, generate with its cache.

    Returns what is not as it should be, `cache` and `documents`, with the reasons (see `Derived`).
    Raises NotProvenError if the reopened model is not the cut model.
    """
    config = subject.config
    after: dict[str, Any] = {}
    for dim in dims:
        if dim in ("hidden", "mlp", "kv_heads", "expert_mlp"):
            after |= after_of(family, config, dim)
        if dim == "layers":
            after["layers"] = list(range(1, family.sizes(config)["layers"]))
    plan = plan_for(family, config, after)
    new = cut_config_of(family, subject, plan)
    student = student_of(family, subject, subject.tensors, plan, new)
    reopened = _reopened(subject, new, dict(cut(subject.tensors.items(), plan, family, config)))
    if distance(logits(reopened, subject.ids), logits(student, subject.ids)) > 0:
        raise NotProvenError("the cut folder does not open as the model that was cut")
    found = {"cache": _caches(reopened, subject.ids), "documents": _mixes(reopened, subject.ids)}
    return {name: reason for name, reason in found.items() if reason}


def _reopened(subject: Subject, config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    with tempfile.TemporaryDirectory() as name, silent():
        folder = Path(name)
        save_file(
            {n: t.contiguous() for n, t in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / "config.json").write_text(json.dumps(config, default=str))
        return subject.kind.from_pretrained(
            name, dtype=torch.float32, experts_implementation="eager"
        ).eval()


def _caches(model: Any, ids: Tensor) -> str:
    """Why the logits after a cached beginning are not those of the whole text; or empty."""
    half = ids.shape[1] // 2
    try:
        first = model(ids[:, :half], use_cache=True)
        second = model(ids[:, half:], past_key_values=first.past_key_values, use_cache=True)
    except Exception as error:  # whatever a model class raises that needs other arguments
        return reason_of(error)
    found = distance(second.logits.double(), logits(model, ids)[:, half:])
    return "" if found < 10 * ROUNDING else f"they differ by {found:.1g} of the largest logit"


def _mixes(model: Any, ids: Tensor) -> str:
    """Why two documents in one row, told apart by their positions, see each other; empty if not."""
    row = torch.cat([ids[:1], ids[1:]], dim=1)
    positions = torch.arange(ids.shape[1]).repeat(1, 2)
    try:
        packed = logits(model, row, position_ids=positions)
    except Exception as error:  # a class without position ids
        return f"its class does not take their positions: {reason_of(error)}"
    alone = torch.cat([logits(model, ids[:1]), logits(model, ids[1:])], dim=1)
    if distance(packed, alone) < 10 * ROUNDING:
        return ""
    reader = _reads_across(model, ids)
    return f"{reader} also reads the documents before a token's own" if reader else "it is not seen"


def _reads_across(model: Any, ids: Tensor) -> str:
    """The first module whose output for a document depends on the document before it.

    Two rows run, of which only the first document differs.
    """
    length = ids.shape[1]
    other = (ids[:1] + 1).clamp(max=int(ids.max()))
    rows = torch.cat([torch.cat([ids[:1], ids[1:]], 1), torch.cat([other, ids[1:]], 1)])
    positions = torch.arange(length).repeat(2, 2)
    for step in trace(model, rows, position_ids=positions):
        given, made = step.given, step.made
        if given is None or made is None:
            continue
        if given.shape[:2] != rows.shape or made.shape[:2] != rows.shape:
            continue
        same = torch.equal(given[0, length:], given[1, length:])
        if same and distance(made[0, length:], made[1, length:]) > ROUNDING:
            return step.template
    return ""
