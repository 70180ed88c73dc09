"""The rotate stage: it reads a checkpoint and text, and writes the model in a rotated basis."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow import families
from regrow.card import ModelDir
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint import checkpoint as checkpoints
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sequences import Sequences
from regrow.data.sources import data_digest
from regrow.layerwise import LayerByLayer, Spill
from regrow.runtime.precision import widen
from regrow.runtime.progress import progress, say
from regrow.sparsity.zeros import refuse_filling
from regrow.stage_dir import Figure, refuse_input, require_space
from regrow.stages.rotate import ADVICE, RotateConfig, basis
from regrow.training.text import text_for

SHOWN = (0.9, 0.99)
"""Shares of the mean square; the stage reports the number of channels that contain each share."""


def rotate(
    model: str | Path | Checkpoint,
    data: DataConfig,
    out: str | Path,
    config: RotateConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Write the model with the principal directions of its residual stream as channels.

    Most of the stream's mean square is then in the first channels, so that a cut of hidden loses
    less. The output is the same up to rounding; lm_head is no longer tied. Raises UserError for a
    family that cannot be rotated, or too little text.
    """
    out, config, options = Path(out), config or RotateConfig(), options or Options()
    options.torch_device()
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    refuse_input(out, checkpoint.folder)
    family = families.of(checkpoint)
    basis.check(family)
    refuse_filling(checkpoint, "a rotation", ADVICE)
    inputs = {"model": checkpoint.fingerprint, "data": data_digest(data)}
    stage = ModelDir(out, "rotate", config, inputs, checkpoint, data)
    if stage.complete:
        say(f"rotate: {out} is complete and unchanged")
        return out
    names = checkpoint.names()
    layout = basis.layout(names, checkpoint.meta, family, checkpoint.config)
    require_space(out, sum(t.numel() * t.element_size() for t in layout.values()))
    tokenizer = checkpoint.tokenizer()
    sequences = text_for(
        [checkpoint.config], data, tokenizer, "calibration", config.samples, checkpoint
    )
    with stage as folder:
        moment_HH = second_moment(checkpoint, sequences, options, Spill(folder / "spill"))
        shutil.rmtree(folder / "spill", ignore_errors=True)
        basis_HH = basis.principal(moment_HH)
        tensors = basis.rotated_tensors(
            names, checkpoint.tensor, family, checkpoint.config, basis_HH
        )
        new_config = basis.rotated_config(checkpoint.config)
        checkpoints.write(folder, new_config, layout, tensors, like=checkpoint)
        stage.figures += _figures(moment_HH)
    before = family.count(checkpoint.config)
    if (after := family.count(new_config)) != before:
        say(f"rotate: the output head is no longer tied: {before:,} parameters, now {after:,}")
    return out


@torch.no_grad()
def second_moment(
    checkpoint: Checkpoint, sequences: Sequences, options: Options, spill: Spill
) -> Tensor:
    """Mean of x̂ x̂ᵀ [H, H] in float64; x̂ = x / sqrt(mean(x²)) is a norm's output without gain.

    The mean is over the real tokens and all norms on the residual stream. One layer of the model
    is in memory at a time.
    """
    family, device = families.of(checkpoint), options.torch_device()
    shell = LayerByLayer.of(checkpoint, family, device)
    total = _Moment(family.sizes(checkpoint.config)["hidden"], device)
    batches = list(sequences.batches(options.batch_size))
    last = len(shell.layers) - 1
    with progress("rotate", int(sequences.real.sum()) * len(shell.layers)) as counter:
        for layer in range(last + 1):
            norms = [name.format(layer=layer) for name in family.residual.values()]
            norms += [family.final_norm.removesuffix(".weight")] if layer == last else []
            with shell.resident(layer):
                handles = [total.watch(shell.model.get_submodule(name)) for name in norms]
                for number, inputs in enumerate(batches):
                    total.real_BT = inputs["real"].to(device)
                    spill.put(number, shell.step(inputs, spill.get(number) if layer else None))
                    counter.advance(int(total.real_BT.sum()))
                for handle in handles:
                    handle.remove()
    return total.mean()


class _Moment:
    """The running sum over the inputs of the hooked modules."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        self.sum_HH = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
        self.tokens = 0
        self.real_BT = torch.empty(0)

    def watch(self, module: nn.Module) -> Any:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x_NH = widen(inputs[0][self.real_BT])
            x_NH = x_NH * x_NH.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
            self.sum_HH += x_NH.T @ x_NH
            self.tokens += len(x_NH)

        return module.register_forward_pre_hook(see)

    def mean(self) -> Tensor:
        return (self.sum_HH / self.tokens).cpu()


def _figures(moment_HH: Tensor) -> list[Figure]:
    shares = torch.linalg.eigvalsh(moment_HH).flip(0).cumsum(0)
    shares /= shares[-1].clone()
    convention = "principal directions of the normed residual stream, calibration text"
    return [
        Figure(
            name=f"channels for {share:.0%} of the mean square",
            value=int((shares < share).sum()) + 1,
            unit="channels",
            n=len(shares),
            convention=convention,
        )
        for share in SHOWN
    ]
