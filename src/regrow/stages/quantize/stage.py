"""The quantize stage: a model folder in, a folder in compressed-tensors out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow import families, plugins, stage_dir
from regrow import plan as plans
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint import checkpoint as checkpoints
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sequences import Sequences, build_sequences, held_out
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.families import Family
from regrow.layerwise import Spill
from regrow.quantization.formats import Scheme
from regrow.quantization.grid import Grid
from regrow.runtime.progress import say
from regrow.stage_dir import StageDir, refuse_input, require_space
from regrow.stages.quantize import METHODS, QuantizeConfig, measure, pack
from regrow.stages.quantize.choose import WEIGHT, choose, fallbacks
from regrow.stages.quantize.layerwise import LayerPass


def quantize(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: QuantizeConfig | None = None,
    data: DataConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Write `model` with its linear layers in few bits, as compressed-tensors; return the folder.

    `data` is for methods that calibrate, and for the perplexity and KL that are printed; both take
    its calibration split. What stays in 16 bits is bfloat16 (float16 if the model is). Raises
    UserError for unknown schemes and patterns, and for a method that needs text and has none.
    """
    out, config, options = Path(out), config or QuantizeConfig(), options or Options()
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    job = check(checkpoint, config, data)
    device = options.torch_device()
    refuse_input(out, checkpoint.folder)
    inputs = {"model": checkpoint.fingerprint}
    if data is not None:
        inputs["data"] = data_digest(data)
    stage = StageDir(out, "quantize", config, inputs)
    if stage.complete:
        say(f"quantize: {out} is complete and unchanged")
    else:
        require_space(out, sum(map(checkpoint.bytes, checkpoint.names())))
        fit, unseen = _text(job, data, options)
        for line in [*_moves(checkpoint, config), *fallbacks(checkpoint, config, job.chosen)]:
            say(f"quantize: {line}")
        with stage as folder:
            job.write(folder, fit, device)
            after = Checkpoint(folder, quantized=True)
            stage.figures += measure.sizes(checkpoint, after, job.family, job.chosen)
            if unseen:
                stage.figures += measure.quality(checkpoint, after, unseen, device)
            schemes = {module: scheme.name for module, scheme in job.chosen.items()}
            stage.extra["schemes"] = schemes
    found = stage_dir.read(out)
    assert found is not None
    print(measure.report(out, found["figures"]))
    return out


def check(checkpoint: Checkpoint, config: QuantizeConfig, data: DataConfig | None) -> QuantizeSetup:
    """What is to be done; raises UserError for what cannot be."""
    pack.check_extra()
    method = plugins.load(METHODS, config.method)
    if method.NEEDS_GRAM and data is None:
        raise UserError(f"{config.method} calibrates on text: give data, or the method rtn")
    family = families.of(checkpoint)
    return QuantizeSetup(checkpoint, family, config, choose(checkpoint, family, config), method)


@dataclass(frozen=True)
class QuantizeSetup:
    """One model to be quantized."""

    checkpoint: Checkpoint
    family: Family
    config: QuantizeConfig
    chosen: dict[str, Scheme]
    method: Any

    @property
    def dtype(self) -> torch.dtype:
        """Of scales, and of what is not quantized."""
        stored = self.checkpoint.main_dtype
        if self.config.dequantize:
            found: torch.dtype = getattr(torch, stored)
            return found
        return torch.float16 if stored == "float16" else torch.bfloat16

    def write(self, folder: Path, batches: list[dict[str, Tensor]], device: torch.device) -> None:
        """Round, and write the folder; what was rounded with text waits on disk meanwhile."""
        with tempfile.TemporaryDirectory(prefix="work-", dir=folder) as place:
            waiting = Spill(Path(place) / "weights")

            def put(module: str, weight: Tensor, grid: Grid) -> None:
                for end, tensor in self.stored(weight, grid).items():
                    waiting.put(f"{module}.{end}", tensor)

            if self.method.NEEDS_GRAM:
                streams = Spill(Path(place) / "streams")
                made = (self.checkpoint, self.family, self.chosen, batches, self.round, put)
                LayerPass(*made, device, streams).run()
            layout = dict(self.layout())
            tensors = self.tensors(waiting, device)
            checkpoints.write(folder, self.new_config(), layout, tensors, self.checkpoint)
        for name in plans.FILES:
            if (self.checkpoint.folder / name).exists():
                shutil.copyfile(self.checkpoint.folder / name, folder / name)

    def round(
        self, weight: Tensor, scheme: Scheme, gram_CC: Tensor | None = None
    ) -> tuple[Tensor, Grid]:
        """A weight on its grid by the method, and the grid."""
        dtype = torch.float16 if self.dtype == torch.float16 else torch.bfloat16
        found: tuple[Tensor, Grid] = self.method.quantize(
            weight, scheme, dtype, gram_CC, self.config.damping
        )
        return found

    def stored(self, weight: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The tensors to write for a rounded weight, by the end of their names."""
        if self.config.dequantize:
            return {"weight": weight.to(self.dtype)}
        return pack.packed(weight, grid)

    def layout(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that will be written, on the meta device."""
        for name in self.checkpoint.names():
            module, shape = name.removesuffix(WEIGHT), self.checkpoint.shapes[name]
            parts = {"weight": (shape, self.dtype)}
            if module not in self.chosen:
                yield name, torch.empty(shape, dtype=self.dtype, device="meta")
                continue
            if not self.config.dequantize:
                parts = pack.layout(shape, self.chosen[module], self.dtype)
            for end, (size, dtype) in parts.items():
                yield f"{module}.{end}", torch.empty(size, dtype=dtype, device="meta")

    def tensors(self, waiting: Spill, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Those tensors, one after the other."""
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
                    made = self.stored(*self.round(weight, self.chosen[module]))
                    rounded = {f"{module}.{end}": tensor for end, tensor in made.items()}
                yield name, rounded[name]

    def new_config(self) -> dict[str, Any]:
        """config.json of the folder."""
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


def _moves(checkpoint: Checkpoint, config: QuantizeConfig) -> list[str]:
    """A line when the weights were trained for another grid."""
    made = stage_dir.read(checkpoint.folder) or {}
    trained = made.get("config", {}).get("fake_quantize")
    if trained in (None, config.scheme):
        return []
    return [
        f"{checkpoint.folder} was trained to be rounded to {trained}; {config.scheme} takes its "
        "weights elsewhere"
    ]


def _text(
    job: QuantizeSetup, data: DataConfig | None, options: Options
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Batches to calibrate on, and those to measure on."""
    if data is None:
        return [], []
    tokenizer = job.checkpoint.tokenizer()
    sequences = build_sequences(data, tokenizer, "calibration", job.config.samples, job.checkpoint)
    if len(sequences) < 2:
        raise UserError(
            "too little text: 1 calibration block, and it takes one to calibrate on and one to "
            "measure on; add text or raise calibration_fraction"
        )
    numbers = range(len(sequences))
    unseen = [n for n in numbers if held_out(n)] or [len(sequences) - 1]
    return tuple(  # type: ignore[return-value]
        list(_rows(sequences, some).batches(options.batch_size))
        for some in ([n for n in numbers if n not in unseen], unseen)
    )


def _rows(sequences: Sequences, numbers: list[int]) -> Sequences:
    return Sequences(
        sequences.input_ids[numbers],
        sequences.position_ids[numbers],
        sequences.labels[numbers],
        sequences.real[numbers],
    )
