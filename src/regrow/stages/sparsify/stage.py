"""The sparsify stage: reads a model folder and writes the same model with zeros in its layers."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow import families, plugins, stage_dir
from regrow.calibration.layer_pass import LayerPass
from regrow.calibration.modules import (
    WEIGHT,
    check_patterns,
    first_match,
    is_router,
    linear_modules,
)
from regrow.calibration.quality import quality, report
from regrow.calibration.text import calibration_text
from regrow.card import ModelDir
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint import checkpoint as checkpoints
from regrow.checkpoint.bitmask import stored_bytes
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.families import Family
from regrow.layerwise import Spill
from regrow.plan import copy_plans
from regrow.runtime.progress import say
from regrow.sparsity import zeros
from regrow.sparsity.pattern import Sparsity
from regrow.stage_dir import Figure, refuse_input, require_space
from regrow.stages.sparsify import METHODS, SparsifyConfig

FOR_EXPERTS = "magnitude"
"""The method for experts, whose inputs are not recorded."""


def sparsify(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: SparsifyConfig | None = None,
    data: DataConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Write `model` with zeros in the matrices of its layers, and return the folder.

    Shapes, dtypes and names stay as they are. Methods that calibrate read the calibration split of
    `data`; the printed perplexity and KL are measured on it, too. Raises UserError for a pattern
    that does not fit a matrix, a method that needs text when there is none, and a quantized model.
    """
    out, config, options = Path(out), config or SparsifyConfig(), options or Options()
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    job = check(checkpoint, config, data)
    device = options.torch_device()
    refuse_input(out, checkpoint.folder)
    inputs = {"model": checkpoint.fingerprint}
    if data is not None:
        inputs["data"] = data_digest(data)
    if job.early is not None:
        inputs["rewind_to"] = job.early.fingerprint
        refuse_input(out, job.early.folder)
        data = data if job.calibrates else None  # a rewound model is measured after its training
    stage = ModelDir(out, "sparsify", config, inputs, checkpoint, data)
    if stage.complete:
        say(f"sparsify: {out} is complete and unchanged")
    else:
        require_space(out, 2 * sum(map(checkpoint.bytes, checkpoint.names())))
        fit, unseen = calibration_text(checkpoint, data, config.samples, options.batch_size)
        for line in job.notes():
            say(f"sparsify: {line}")
        with stage as folder:
            job.write(folder, fit, device)
            after = Checkpoint(folder)
            stage.figures += sizes(after, job.modules)
            if unseen and job.early is None:
                stage.figures += quality(checkpoint, after, unseen, device, "KL(dense || sparse)")
            stage.extra[zeros.NOTE] = str(job.target)
    manifest = stage_dir.read(out)
    assert manifest is not None
    print(report("sparse", out, manifest["figures"]))
    return out


def check(checkpoint: Checkpoint, config: SparsifyConfig, data: DataConfig | None) -> SparsifySetup:
    """Choose the modules; raises UserError before any slow work."""
    if checkpoint.quantized:
        raise UserError(f"{checkpoint.folder} is quantized: sparsify first and quantize last")
    family = families.of(checkpoint)
    inside = [m for m in linear_modules(checkpoint) if m.startswith("model.layers.")]
    check_patterns({"keep": config.keep}, inside)
    chosen = [
        module
        for module in inside
        if first_match(config.keep, module) is None and not is_router(family, module + WEIGHT)
    ]
    if not chosen:
        raise UserError(
            f"nothing is left to sparsify: keep {list(config.keep)} matches every module"
        )
    for module in chosen:
        check_width(config, module + WEIGHT, checkpoint.shapes[module + WEIGHT])
    early = None if config.rewind_to is None else earlier(config.rewind_to, checkpoint)
    setup = SparsifySetup(checkpoint, family, config, chosen, early)
    if setup.calibrates and data is None:
        raise UserError(
            f"{config.method} calibrates on text: give data, or the method magnitude, which loses "
            "far more"
        )
    return setup


def earlier(model: str, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint to rewind to; raises UserError if it is none of the same model."""
    early = load(model)
    for name, shape in checkpoint.shapes.items():
        if early.shapes.get(name) != shape:
            there = list(early.shapes[name]) if name in early.shapes else "missing"
            raise UserError(
                f"rewind_to {model}: {name} is {there} there and {list(shape)} in "
                f"{checkpoint.folder}: give an earlier checkpoint of that model"
            )
    return early


def check_width(config: SparsifyConfig, name: str, shape: tuple[int, ...]) -> None:
    """Raise UserError for a matrix of a layer whose rows are not a whole number of groups of M."""
    group, module = config.target.of, name.removesuffix(WEIGHT)
    if not group or len(shape) != 2 or not name.startswith("model.layers."):
        return
    if shape[1] % group and first_match(config.keep, module) is None:
        raise UserError(
            f"pattern {config.pattern}: {module} has {shape[1]} columns, which is no multiple of "
            f"{group}: give a sparsity instead, prune to a multiple of {group}, or add the module "
            "to keep"
        )


@dataclass(frozen=True)
class SparsifySetup:
    """A model to sparsify, and the modules whose weights get zeros."""

    checkpoint: Checkpoint
    family: Family
    config: SparsifyConfig
    modules: list[str]
    early: Checkpoint | None = None
    """The checkpoint with the values of the weights that stay, instead of the model's own."""

    @property
    def target(self) -> Sparsity:
        """The sparsity or the pattern."""
        return self.config.target

    @property
    def experts(self) -> list[str]:
        """The modules that are experts."""
        places = {module: self.family.find(module + WEIGHT) for module in self.modules}
        return [module for module, place in places.items() if place and place.expert is not None]

    @property
    def calibrates(self) -> bool:
        """Whether the method reads text."""
        return bool(self._method(self.config.method).NEEDS_GRAM)

    def notes(self) -> list[str]:
        """A line if experts get another method than the config's."""
        if not self.calibrates or not self.experts:
            return []
        return [
            f"the experts are sparsified by {FOR_EXPERTS}: {self.config.method} needs the inputs "
            "of each of them, which are not recorded"
        ]

    def write(self, folder: Path, batches: list[dict[str, Tensor]], device: torch.device) -> None:
        """Sparsify all weights and write the folder; new weights are first stored on disk."""
        checkpoint = self.checkpoint
        with tempfile.TemporaryDirectory(prefix="work-", dir=folder) as place:
            waiting = Spill(Path(place) / "weights")

            def change(module: str, weight: Tensor, gram_CC: Tensor | None) -> Tensor:
                new = self.new_weight(module, weight, gram_CC)
                waiting.put(module, new)
                return new

            if self.calibrates:
                calibrated = set(self.modules) - set(self.experts)
                work = (checkpoint, self.family, self.modules, calibrated, batches)
                LayerPass("sparsify", *work, change, device, Spill(Path(place) / "streams")).run()
            source = self.early or checkpoint
            layout = {name: source.meta(name) for name in checkpoint.names()}
            tensors = self._tensors(waiting, device)
            checkpoints.write(folder, checkpoint.config, layout, tensors, like=checkpoint)
        copy_plans(checkpoint.folder, folder)

    def new_weight(self, module: str, weight: Tensor, gram_CC: Tensor | None) -> Tensor:
        """A weight with zeros, in its own dtype; experts have no `gram_CC`."""
        method = self._method(
            FOR_EXPERTS if self.calibrates and gram_CC is None else self.config.method
        )
        new: Tensor = method.sparsify(
            weight, self.target, gram_CC, self.config.damping, self._draw(module)
        )
        return new.to(weight.dtype)

    def _draw(self, module: str) -> torch.Generator:
        """A generator for each module, so that the order of the modules does not matter."""
        digest = hashlib.sha256(f"{self.config.seed}/{module}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _method(self, name: str) -> Any:
        return plugins.load(METHODS, name)

    def _tensors(self, waiting: Spill, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """The names and values of all tensors, one after the other."""
        for name in self.checkpoint.names():
            module, tensor = name.removesuffix(WEIGHT), self.checkpoint.tensor(name)
            if module in waiting:
                tensor = waiting.get(module)
            elif module in self.modules:
                tensor = self.new_weight(module, tensor.to(device), None).cpu()
            if self.early is not None:
                zero = tensor == 0 if module in self.modules else None
                tensor = self.early.tensor(name)
                tensor = tensor if zero is None else tensor.masked_fill(zero, 0)
            yield name, tensor


def sizes(after: Checkpoint, modules: list[str]) -> list[Figure]:
    """Shares of zeros, and the bytes of the folder and of the same weights as a bitmask."""
    total = sum(map(after.bytes, after.names()))
    zero = count = saved = 0
    for module in modules:
        name = module + WEIGHT
        weight = after.tensor(name)
        values = int((weight != 0).sum())
        zero, count = zero + weight.numel() - values, count + weight.numel()
        saved += after.bytes(name) - stored_bytes(after.shapes[name], values, weight.itemsize)
    every = sum(math.prod(shape) for shape in after.shapes.values())
    return [
        Figure(name="zeros", value=zero / count, n=count, convention="of the sparse matrices"),
        Figure(name="zeros of all", value=zero / every, n=every, convention="of all parameters"),
        Figure(name="bytes", value=total, unit="bytes", convention="with the zeros stored"),
        Figure(
            name="bytes as bitmask",
            value=total - saved,
            unit="bytes",
            convention="the values that are not zero, and a bit per weight of the sparse matrices",
        ),
    ]
