"""The sparsify stage: reads a model folder and writes the same model with zeros in its layers."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping
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
)
from regrow.calibration.quality import quality, report
from regrow.calibration.text import calibration_text
from regrow.card import ModelDir
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint import checkpoint as checkpoints
from regrow.checkpoint.bitmask import stored_bytes
from regrow.checkpoint.model_config import HEAD
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
from regrow.training.rates import RANDOM_WEIGHTS, has_random_weights

Shapes = Mapping[str, tuple[int, ...]]
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
            stage.extra[zeros.NOTE] = _measured(job.target, stage.figures)
            stage.extra[RANDOM_WEIGHTS] = has_random_weights(job.early or checkpoint) or None
    manifest = stage_dir.read(out)
    assert manifest is not None
    print(report("sparse", out, manifest["figures"]))
    return out


def _measured(target: Sparsity, figures: list[Figure]) -> str:
    """The pattern, or the share of zeros that there is: earlier zeros may be more than asked."""
    share = next(figure.value for figure in figures if figure.name == "zeros")
    return str(target) if target.of else f"{share:.3g}"


def check(checkpoint: Checkpoint, config: SparsifyConfig, data: DataConfig | None) -> SparsifySetup:
    """Choose the modules; raises UserError before any slow work."""
    if checkpoint.quantized:
        raise UserError(f"{checkpoint.folder} is quantized: sparsify first and quantize last")
    family = families.of(checkpoint)
    chosen = choose_modules(family, config, checkpoint.shapes)
    early = None if config.rewind_to is None else earlier(config.rewind_to, checkpoint)
    setup = SparsifySetup(checkpoint, family, config, chosen, early)
    if setup.calibrates and data is None:
        raise UserError(
            f"{config.method} calibrates on text: give data, or the method magnitude, which loses "
            "far more"
        )
    return setup


def choose_modules(family: Family, config: SparsifyConfig, shapes: Shapes) -> list[str]:
    """The modules of a model with these tensors; raises UserError for what does not fit."""
    inside = [
        name.removesuffix(WEIGHT)
        for name, shape in shapes.items()
        if len(shape) == 2 and name.startswith("model.layers.")
    ]
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
        check_width(config, module, shapes[module + WEIGHT][1])
    return chosen


def earlier(model: str, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint to rewind to; raises UserError if it is none of the same model."""
    early = load(model)
    check_shapes(model, _own_shapes(early), _own_shapes(checkpoint), str(checkpoint.folder))
    return early


def earlier_shapes(model: str) -> Shapes:
    """The shape of each tensor of the checkpoint to rewind to."""
    return _own_shapes(load(model))


def _own_shapes(checkpoint: Checkpoint) -> Shapes:
    """The shapes without the head that some folders also store although it is the embedding."""
    tied = checkpoint.tied
    return {name: s for name, s in checkpoint.shapes.items() if not (tied and name == HEAD)}


def check_shapes(rewind_to: str, early: Shapes, now: Shapes, place: str) -> None:
    """Raise UserError if the tensors of the two models differ in names or shapes."""
    for name in sorted({*early, *now}):
        if early.get(name) != now.get(name):
            there, here = (
                list(shapes[name]) if name in shapes else "missing" for shapes in (early, now)
            )
            raise UserError(
                f"rewind_to {rewind_to}: {name} is {there} there and {here} in {place}: give an "
                "earlier checkpoint of that model"
            )


def check_width(config: SparsifyConfig, module: str, columns: int) -> None:
    """Raise UserError for rows that are no whole number of groups of M, or that would be empty."""
    group, share = config.target.of, config.target.share
    per_row = getattr(plugins.load(METHODS, config.method), "PER_ROW", False)
    if not group and per_row and round(share * columns) in (0, columns):
        none = "none" if round(share * columns) == 0 else "all"
        raise UserError(
            f"sparsity {share:g}: {config.method} counts in each row, and of the {columns} weights "
            f"of a row of {module} {none} would become zero: give another share, or the method "
            "sparsegpt or magnitude"
        )
    if group and columns % group:
        raise UserError(
            f"pattern {config.pattern}: {module} has {columns} columns, which is no multiple of "
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
            layout = {name: checkpoint.meta(name) for name in checkpoint.names()}
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
            yield name, tensor if self.early is None else self._rewound(name, tensor)

    def _rewound(self, name: str, tensor: Tensor) -> Tensor:
        """The values of the earlier checkpoint, with the zeros of all rounds."""
        assert self.early is not None
        early = self.early.tensor(name).to(tensor.dtype)
        matrix = name.startswith("model.layers.") and tensor.ndim > 1
        zero = zeros.held(tensor, 0.0) if matrix else None
        return early if zero is None else early.masked_fill(zero, 0)


def sizes(after: Checkpoint, modules: list[str]) -> list[Figure]:
    """Shares of zeros, and the bytes of the folder and of the same weights as a bitmask."""
    total = sum(map(after.bytes, after.names()))
    zero = count = saved = 0
    for module in modules:
        name = module + WEIGHT
        weight = after.tensor(name)
        values = int((weight != 0).sum())
        zero, count = zero + weight.numel() - values, count + weight.numel()
        as_bitmask = stored_bytes(after.shapes[name], values, weight.itemsize)
        saved += max(0, after.bytes(name) - as_bitmask)
    every = sum(math.prod(shape) for shape in after.shapes.values())
    return [
        Figure(name="zeros", value=zero / count, n=count, convention="of the sparse matrices"),
        Figure(name="zeros of all", value=zero / every, n=every, convention="of all parameters"),
        Figure(name="bytes", value=total, unit="bytes", convention="with the zeros stored"),
        Figure(
            name="bytes as bitmask",
            value=total - saved,
            unit="bytes",
            convention="as export --type bitmask stores them: where that is smaller, a bit per "
            "weight and the values that are not zero",
        ),
    ]
