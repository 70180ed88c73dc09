"""The quantize stage: reads a model folder and writes a compressed-tensors folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow import families, plugins, stage_dir
from regrow.calibration.layer_pass import LayerPass
from regrow.calibration.modules import WEIGHT
from regrow.calibration.quality import quality, report
from regrow.calibration.text import calibration_text
from regrow.card import ModelDir
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint import checkpoint as checkpoints
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.families import Family
from regrow.layerwise import Spill
from regrow.plan import copy_plans
from regrow.quantization.formats import Scheme
from regrow.quantization.grid import Grid
from regrow.runtime.progress import say
from regrow.sparsity import zeros
from regrow.stage_dir import refuse_input, require_space
from regrow.stages.quantize import METHODS, QuantizeConfig, measure, pack
from regrow.stages.quantize.choose import choose, fallbacks


def quantize(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: QuantizeConfig | None = None,
    data: DataConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Write `model` with quantized linear layers, as compressed-tensors, and return the folder.

    Methods that calibrate read the calibration split of `data`; the printed perplexity and KL are
    measured on it, too. Tensors that are not quantized become bfloat16 (float16 in a float16
    model). Raises UserError for unknown schemes and patterns, and for a method that needs text
    when there is none.
    """
    out, config, options = Path(out), config or QuantizeConfig(), options or Options()
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    job = check(checkpoint, config, data)
    device = options.torch_device()
    refuse_input(out, checkpoint.folder)
    inputs = {"model": checkpoint.fingerprint}
    if data is not None:
        inputs["data"] = data_digest(data)
    stage = ModelDir(out, "quantize", config, inputs, checkpoint, data)
    if stage.complete:
        say(f"quantize: {out} is complete and unchanged")
    else:
        require_space(out, sum(map(checkpoint.bytes, checkpoint.names())))
        fit, unseen = calibration_text(checkpoint, data, config.samples, options.batch_size)
        fell_back = fallbacks(checkpoint, config, job.chosen)
        for line in [*_other_grid(checkpoint, config), *fell_back, *job.notes()]:
            say(f"quantize: {line}")
        with stage as folder:
            job.write(folder, fit, device)
            after = Checkpoint(folder, quantized=True)
            stage.figures += measure.sizes(checkpoint, after, job.family, job.chosen)
            if unseen:
                stage.figures += quality(
                    checkpoint, after, unseen, device, "KL(unquantized || quantized)"
                )
            stage.extra["schemes"] = {module: s.name for module, s in job.chosen.items()}
            stage.extra["methods"] = {s.name: method_of(config, s) for s in job.schemes}
    manifest = stage_dir.read(out)
    assert manifest is not None
    print(report("quantized", out, manifest["figures"]))
    return out


def check(checkpoint: Checkpoint, config: QuantizeConfig, data: DataConfig | None) -> QuantizeSetup:
    """Choose the schemes and methods of all layers; raises UserError before any slow work."""
    pack.check_extra()
    if not config.dequantize:
        checkpoint.refuse_multimodal(
            "packed weights are not written into it; give dequantize (the rounded values as plain "
            "weights), or export its text model to GGUF"
        )
    family = families.of(checkpoint)
    setup = QuantizeSetup(checkpoint, family, config, choose(checkpoint, family, config))
    if setup.calibrates and data is None:
        by_text = next(s for s in setup.schemes if method_module(config, s).NEEDS_GRAM)
        raise UserError(
            f"{method_of(config, by_text)} calibrates on text: give data, or use the method rtn "
            f"(with {by_text.name} it loses more), or an 8-bit scheme"
        )
    return setup


def method_of(config: QuantizeConfig, scheme: Scheme) -> str:
    """The config's method; by default gptq for a scheme that benefits from text, otherwise rtn."""
    return config.method or ("gptq" if scheme.needs_text else "rtn")


def method_module(config: QuantizeConfig, scheme: Scheme) -> Any:
    """The plug-in that rounds weights to a scheme."""
    return plugins.load(METHODS, method_of(config, scheme))


@dataclass(frozen=True)
class QuantizeSetup:
    """A model to quantize, and the scheme of each module."""

    checkpoint: Checkpoint
    family: Family
    config: QuantizeConfig
    chosen: dict[str, Scheme]

    @property
    def schemes(self) -> list[Scheme]:
        """All schemes in use, sorted by name."""
        by_name = {scheme.name: scheme for scheme in self.chosen.values()}
        return [by_name[name] for name in sorted(by_name)]

    @property
    def calibrates(self) -> bool:
        """Whether any layer uses a method that reads text."""
        return any(method_module(self.config, scheme).NEEDS_GRAM for scheme in self.schemes)

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most of the checkpoint's values."""
        dtype: torch.dtype = getattr(torch, self.checkpoint.main_dtype)
        return dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scales, and the dtype that config.json names."""
        if self.config.dequantize:
            return self.main_dtype
        return torch.float16 if self.main_dtype == torch.float16 else torch.bfloat16

    def kept_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor that is not quantized.

        It is the dtype of the scales. Tensors that the checkpoint stores in more bits than most
        others, such as norms in float32, keep their dtype.
        """
        stored_dtype: torch.dtype = getattr(torch, self.checkpoint.dtype(name))
        return stored_dtype if stored_dtype.itemsize > self.main_dtype.itemsize else self.dtype

    def notes(self) -> list[str]:
        """A line for each scheme that vLLM does not support on a CPU."""
        if self.config.dequantize:
            return []
        return [
            f"{scheme.name}: vLLM has no kernel for it on a CPU; int8-dynamic, fp8 and int4 work "
            "there"
            for scheme in self.schemes
            if not scheme.vllm_on_cpu
        ]

    def write(self, folder: Path, batches: list[dict[str, Tensor]], device: torch.device) -> None:
        """Round all weights and write the folder; calibrated weights are first stored on disk."""
        with tempfile.TemporaryDirectory(prefix="work-", dir=folder) as place:
            waiting = Spill(Path(place) / "weights")

            def change(module: str, weight: Tensor, gram_CC: Tensor | None) -> Tensor:
                rounded, grid = self.round(weight, self.chosen[module], gram_CC)
                for end, tensor in self.stored(rounded, grid).items():
                    waiting.put(f"{module}.{end}", tensor)
                return rounded

            if self.calibrates:
                calibrated = {
                    module: scheme
                    for module, scheme in self.chosen.items()
                    if method_module(self.config, scheme).NEEDS_GRAM
                }
                streams = Spill(Path(place) / "streams")
                work = (self.checkpoint, self.family, [*self.chosen], set(calibrated), batches)
                LayerPass("quantize", *work, change, device, streams).run()
            layout = dict(self.layout())
            tensors = self.tensors(waiting, device)
            checkpoints.write(folder, self.new_config(), layout, tensors, self.checkpoint)
        copy_plans(self.checkpoint.folder, folder)

    def round(
        self, weight: Tensor, scheme: Scheme, gram_CC: Tensor | None = None
    ) -> tuple[Tensor, Grid]:
        """Round a weight by its scheme's method; returns the rounded weight and its grid."""
        dtype = torch.float16 if self.main_dtype == torch.float16 else torch.bfloat16
        method, damping = method_module(self.config, scheme), self.config.damping
        held = zeros.held(weight, zeros.least_share(self.checkpoint))
        rounded: tuple[Tensor, Grid] = method.quantize(
            weight, scheme, dtype, gram_CC, damping, held
        )
        return rounded

    def stored(self, weight: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The tensors to write for a rounded weight; the keys are the last part of their names."""
        if self.config.dequantize:
            return {"weight": weight.to(self.dtype)}
        return pack.packed(weight, grid)

    def layout(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that will be written, on the meta device."""
        for name in self.checkpoint.names():
            module, shape = name.removesuffix(WEIGHT), self.checkpoint.shapes[name]
            parts = {"weight": (shape, self.dtype)}
            if module not in self.chosen:
                yield name, torch.empty(shape, dtype=self.kept_dtype(name), device="meta")
                continue
            if not self.config.dequantize:
                parts = pack.layout(shape, self.chosen[module], self.dtype)
            for end, (size, dtype) in parts.items():
                yield f"{module}.{end}", torch.empty(size, dtype=dtype, device="meta")

    def tensors(self, waiting: Spill, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """The names and values of the layout's tensors, one after the other."""
        rounded: dict[str, Tensor] = {}
        for name, like in self.layout():
            module = name.rpartition(".")[0]
            if module not in self.chosen or (
                name in self.checkpoint.shapes and name != module + WEIGHT
            ):
                yield name, self.checkpoint.tensor(name).to(like.dtype)
            elif name in waiting:
                yield name, waiting.get(name)
            else:
                if name not in rounded:
                    weight = self.checkpoint.tensor(module + WEIGHT).to(device)
                    parts = self.stored(*self.round(weight, self.chosen[module]))
                    rounded = {f"{module}.{end}": tensor for end, tensor in parts.items()}
                yield name, rounded[name]

    def new_config(self) -> dict[str, Any]:
        """The content of the folder's config.json."""
        config = {k: v for k, v in self.checkpoint.config.items() if k != "torch_dtype"}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.config.dequantize:
            return config
        modules = {n.removesuffix(WEIGHT) for n, s in self.checkpoint.shapes.items() if len(s) == 2}
        head, embedding = (
            n.removesuffix(WEIGHT) for n in (self.family.head, self.family.embedding)
        )
        kept = (modules | {head}) - set(self.chosen) - {embedding}
        return {**config, "quantization_config": pack.quantization_config(self.chosen, kept)}


def _other_grid(checkpoint: Checkpoint, config: QuantizeConfig) -> list[str]:
    """A warning line if the weights were trained for the grid of another scheme."""
    manifest = stage_dir.read(checkpoint.folder) or {}
    trained = manifest.get("config", {}).get("fake_quantize")
    if trained in (None, config.scheme):
        return []
    return [
        f"{checkpoint.folder} was trained for rounding to {trained}; rounding it to "
        f"{config.scheme} loses the gain of that training"
    ]
