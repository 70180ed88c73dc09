"""Writes a folder whose sparse weights are stored as bitmasks, and reads it back to compare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from regrow.card import ModelDir
from regrow.checkpoint import Checkpoint, bitmask
from regrow.checkpoint import checkpoint as checkpoints
from regrow.cost.units import size_text
from regrow.errors import UserError
from regrow.plan import copy_plans
from regrow.runtime.progress import say
from regrow.sparsity import zeros
from regrow.stage_dir import Figure, refuse_input
from regrow.stages.export import BITMASK, ExportConfig

READERS = (
    "regrow opens it as any model. compressed-tensors up to 0.14 opens it; transformers 5 and vLLM "
    "from 0.19.1 on do not: give them the dense folder"
)
WEIGHT = bitmask.WEIGHT


def write(checkpoint: Checkpoint, out: Path, config: ExportConfig) -> Path:
    """Write the folder `out`; raises UserError for a model without sparse weights."""
    refuse_input(out, checkpoint.folder)
    stage = ModelDir(out, "export", config, {"model": checkpoint.fingerprint}, checkpoint)
    if stage.complete:
        say(f"export: {out} is complete and unchanged")
        return out
    modules = sparse_modules(checkpoint)
    with stage as folder:
        _write(checkpoint, modules, folder)
        stage.figures += _compare(checkpoint, folder, modules)
        stage.extra["verified"] = ["every weight is read back with the same values"]
        if (noted := zeros.recorded(checkpoint)) is not None:
            stage.extra[zeros.NOTE] = noted
    size, before = (figure.value for figure in stage.figures[:2])
    say(f"export: {out}, {size_text(size)} instead of {size_text(before)}; {READERS}")
    return out


def describe(checkpoint: Checkpoint) -> list[str]:
    """The folder that would be written, for --dry-run."""
    modules = sparse_modules(checkpoint)
    size = sum(map(checkpoint.bytes, checkpoint.names()))
    weights = [checkpoint.tensor(module + WEIGHT) for module in modules]
    saved = sum(weight.numel() * weight.itemsize - _packed_bytes(weight) for weight in weights)
    return [
        f"export: {len(modules)} sparse weights as bitmasks, {size_text(size - saved)} instead "
        f"of {size_text(size)}"
    ]


def sparse_modules(checkpoint: Checkpoint) -> list[str]:
    """The modules that a bitmask makes smaller; raises UserError when there is none."""
    checkpoint.refuse_multimodal("bitmasks are not written into it")
    found = [
        name.removesuffix(WEIGHT)
        for name, weight in zeros.weights(checkpoint)
        if name.endswith(WEIGHT) and _packed_bytes(weight) < weight.numel() * weight.itemsize
    ]
    if not found:
        raise UserError(
            f"type {BITMASK}: no weight of {checkpoint.folder} is sparse enough, and a bitmask "
            "would make it larger: run regrow sparsify first, or give another type"
        )
    return found


def _packed_bytes(weight: Tensor) -> int:
    values = int((weight != 0).sum())
    return bitmask.stored_bytes(tuple(weight.shape), values, weight.itemsize)


def _write(checkpoint: Checkpoint, modules: list[str], folder: Path) -> None:
    layout: dict[str, Tensor] = {}
    for name in checkpoint.names():
        module = name.removesuffix(WEIGHT)
        if module not in modules:
            layout[name] = checkpoint.meta(name)
            continue
        parts = bitmask.pack(checkpoint.tensor(name))
        layout |= {f"{module}.{part}": tensor.to("meta") for part, tensor in parts.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in checkpoint.names():
            module = name.removesuffix(WEIGHT)
            if module not in modules:
                yield name, checkpoint.tensor(name)
                continue
            for part, tensor in bitmask.pack(checkpoint.tensor(name)).items():
                yield f"{module}.{part}", tensor

    linear = {n.removesuffix(WEIGHT) for n, s in checkpoint.shapes.items() if len(s) == 2}
    share = _share(checkpoint, modules)
    structure = zeros.recorded(checkpoint) or "unstructured"
    structure = structure if ":" in structure else "unstructured"
    entry = bitmask.sparsity_config(sorted(linear - set(modules)), share, structure)
    config = {**checkpoint.config, "quantization_config": entry}
    checkpoints.write(folder, config, layout, tensors(), like=checkpoint)
    copy_plans(checkpoint.folder, folder)


def _share(checkpoint: Checkpoint, modules: list[str]) -> float:
    shares = [zeros.share(checkpoint.tensor(module + WEIGHT)) for module in modules]
    return sum(shares) / len(shares)


def _compare(checkpoint: Checkpoint, folder: Path, modules: list[str]) -> list[Figure]:
    """The sizes; raises AssertionError if a weight is read back with another value."""
    stored = bitmask.Packed(folder)
    for name in checkpoint.names():
        assert torch.equal(stored.tensor(name), checkpoint.tensor(name)), name
    before = sum(map(checkpoint.bytes, checkpoint.names()))
    size = stored.bytes()
    return [
        Figure(name="file_bytes", value=size, unit="bytes", convention=BITMASK),
        Figure(name="bytes before", value=before, unit="bytes", convention="dense"),
        Figure(name="zeros", value=_share(checkpoint, modules), convention="of the sparse weights"),
    ]
