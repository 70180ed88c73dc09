"""Sequential repair: each layer is re-solved for the input that it receives in the cut model.

The dense and the cut model process the profile's text in parallel, one layer of each at a time.
A layer has two parts, attention and MLP, and the last projection of each (`o_proj`, `down_proj`)
is re-solved. Let x̂ be its input and ĥ the residual stream before the part in the cut model; in the
dense model the part takes the stream from h to h⁺. The new weights are

    W' = argmin Σ_t w_t |W' x̂ − (h⁺ − h) − u (h − ĥ)|² + λ |W' − W|²,   w_t = 1/|h|²

With u = 1 (`RepairSetup.upstream`), every part tries to bring the cut model's stream back to the
dense model's stream, including the error of earlier layers. The kept layer before a dropped layer
replaces it: its h⁺ is the stream that enters the next kept layer. λ is chosen by the error on the
validation sequences. A part whose stream has no error yet, such as those before the first cut, is
left as it is. If the family has biases, they are solved together with the weights. If there
is a norm between projection and stream (Gemma 3), its inverse is applied to the target, with the
scale of the dense output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from regrow.data.sequences import VALIDATE_EVERY, Sequences, Subset, fit_and_validate
from regrow.layerwise import LayerByLayer, Spill
from regrow.pruning.cut import cut_layers
from regrow.pruning.repair import RepairSetup, Solutions
from regrow.pruning.repair._ridge import Observations, Solution, refit
from regrow.runtime.precision import rounding, widen
from regrow.runtime.progress import Progress, progress

GRAMS = False
RIDGES = (1e-1, 3e-1, 1.0, 3.0, 10.0)  # larger than for gram: errors accumulate over layers
PARTS = ("heads", "mlp")  # attention and MLP, named by the input of the last projection


def repair(setup: RepairSetup, ridges: tuple[float, ...] = RIDGES) -> Sequential:
    """The new weights; all are solved in this call and stored in `setup.work`."""
    solver = Sequential(setup, ridges)
    solver.run()
    return solver


def work_bytes(sizes: dict[str, int], tokens: int) -> int:
    """Bytes of streams and reader inputs (2 per value) and of solved projections (4 per value)."""
    heads, mlp = sizes["heads"] * sizes["head_dim"], sizes.get("mlp", 0)
    states = tokens * (5 * sizes["hidden"] + max(heads, mlp))
    return 2 * states + 4 * sizes["layers"] * sizes["hidden"] * (heads + mlp)


class Sequential:
    """The dense and the cut model, one layer of each in memory, and the solutions so far."""

    @torch.no_grad()
    def __init__(self, setup: RepairSetup, ridges: tuple[float, ...]) -> None:
        self.setup = setup = setup.with_whole_vocabulary()
        self.ridges = ridges
        self.solutions: Solutions = {}
        self._weights = Spill(setup.work / "weights")
        self._streams = {name: Spill(setup.work / name) for name in ("dense", "cut")}
        self._before = {dim: Spill(setup.work / f"before-{dim}") for dim in PARTS}
        self._scale = {dim: Spill(setup.work / f"scale-{dim}") for dim in PARTS}
        self._reached = {name: Spill(setup.work / f"reader-{name}") for name in ("input", "stream")}
        self._batches = _batches(setup)
        device = setup.options.torch_device()
        self._dense = LayerByLayer.of(setup.checkpoint, setup.family, device)
        self._cut = cut_layers(setup.checkpoint, setup.plan, setup.family, device, like=self._dense)

    def __call__(self, name: str, kept: Tensor) -> Tensor:
        """The tensor to write for the dense model's tensor `name`; `kept` is its kept part."""
        return self._weights.get(name).to(kept.dtype) if name in self._weights else kept

    @torch.no_grad()
    def run(self) -> None:
        """Solve every layer, from the first to the last."""
        kept, layers = self.setup.plan.kept_layers(), self.setup.plan.before["layers"]
        tokens = sum(int(inputs["real"].sum()) for _, inputs in self._batches)
        with progress("repair", tokens * (layers + len(kept))) as counter:
            self._run_dense(range(kept[0]), counter)
            for new, (old, following) in enumerate(pairwise([*kept, layers])):
                self._run_dense([old], counter, watched=True)
                self._run_dense(range(old + 1, following), counter)
                self._solve_layer(new, old)
                counter.advance(tokens)

    def _run_dense(self, layers: Iterable[int], counter: Progress, watched: bool = False) -> None:
        """Run the dense stream through these layers; if `watched`, store it before each part."""
        stream, family = self._streams["dense"], self.setup.family
        for layer in layers:
            names = [*family.residual.values(), *family.post_norm.values()] if watched else []
            with self._dense.resident(layer), _inputs(self._dense.model, names, layer) as recorded:
                for n, (_, inputs) in enumerate(self._batches):
                    stream.put(n, self._dense.step(inputs, stream.get(n) if layer else None))
                    for dim in PARTS if watched else ():
                        self._before[dim].put(n, recorded[family.residual[dim]])
                        if dim in family.post_norm:
                            y_BTH = widen(recorded[family.post_norm[dim]])
                            self._scale[dim].put(n, y_BTH.square().mean(-1, keepdim=True).sqrt())
                    counter.advance(int(inputs["real"].sum()))

    def _solve_layer(self, new: int, old: int) -> None:
        """Re-solve the parts of the cut model's layer `new`, and run its stream through them."""
        stream, readers = self._streams["cut"], self._readers(new)
        with self._cut.resident(new):
            if "heads" not in readers and "mlp" in readers:
                self._pass_mixer(new)
            for dim, template in readers.items():
                self._solve_reader(template, dim, new, old)
                # A layer with experts is run as a whole below, from the stream before the layer.
                for n in range(len(self._batches)) if "mlp" in readers else ():
                    stream.put(n, self._output(template, dim, new, n))
            for n, (_, inputs) in enumerate(self._batches) if "mlp" not in readers else ():
                stream.put(n, self._cut.step(inputs, stream.get(n) if new else None))

    def _pass_mixer(self, new: int) -> None:
        """Run the stream through the part before the MLP of a layer without attention heads."""
        stream, residual = self._streams["cut"], self.setup.family.residual["mlp"]
        for n, (_, inputs) in enumerate(self._batches):
            model = self._cut.model
            with _inputs(model, [residual], new, residual) as seen, suppress(_ReachedError):
                self._cut.step(inputs, stream.get(n) if new else None)
            stream.put(n, seen[residual])

    def _readers(self, layer: int) -> dict[str, str]:
        """Template of the last projection of each part, in order, for a layer of the cut model."""
        return {
            dim: template
            for dim in PARTS
            for template in self.setup.family.readers(dim)
            if template.replace("{layer}", str(layer)) in self._cut.names
        }

    def _solve_reader(self, template: str, dim: str, new: int, old: int) -> None:
        module = self._cut.model.get_submodule(_module(template, new))
        assert isinstance(module, nn.Linear)
        weight = _joined(module)
        fit, validate, errors = Observations(weight), Observations(weight), list[Tensor]()
        for n, (subset, inputs) in enumerate(self._batches):
            x_BTi, stream_BTH = self._reach(template, dim, new, n, inputs)
            self._reached["input"].put(n, x_BTi)
            self._reached["stream"].put(n, stream_BTH)
            before_BTH = widen(self._before[dim].get(n).to(x_BTi.device))
            target_BTH = self._target(dim, old, n, before_BTH, widen(stream_BTH))
            real = inputs["real"].to(x_BTi.device)
            # The floor keeps the weight of an all-zero residual finite.
            weight_N1 = 1 / before_BTH[real].norm(dim=-1, keepdim=True).clamp_min(1e-6)
            x_Ni = widen(x_BTi[real])
            if module.bias is not None:
                x_Ni = torch.cat([x_Ni, torch.ones_like(x_Ni[:, :1])], dim=1)
            seen = validate if subset == "validate" else fit
            seen.add(x_Ni * weight_N1, target_BTH[real] * weight_N1)
            if seen is validate:
                error_NH = widen(module(x_BTi[real])) - target_BTH[real]
                after_NH = (widen(stream_BTH) + target_BTH)[real]
                errors.append(error_NH.square().sum(-1) / after_NH.square().sum(-1))
        exact = float(torch.cat(errors).mean()) < self._rounding(dim)
        ridges = () if exact else self.ridges
        self._put(module, template, old, refit(weight, fit, validate, ridges))

    def _rounding(self, dim: str) -> float:
        """The mean of |W x̂ − target|² / |h⁺|² that is only the rounding of the streams.

        0 if there is a norm between reader and stream, or a multiplier: they change the scale.
        """
        family = self.setup.family
        scaled = dim in family.post_norm or family.residual_multiplier != 1
        return 0.0 if scaled else rounding(self._cut.dtype)

    def _reach(
        self, template: str, dim: str, new: int, n: int, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The input of the reader, and the stream that the output of its part is added to."""
        reader, residual = template.removesuffix(".weight"), self.setup.family.residual[dim]
        model, stream = self._cut.model, self._streams["cut"]
        with _inputs(model, [reader, residual], new, reader) as recorded, suppress(_ReachedError):
            if dim == "heads":
                self._cut.step(inputs, stream.get(n) if new else None)
            else:  # start from the stream after the attention, to avoid running it again
                norm = model.get_submodule(_module(residual, new))
                part = model.get_submodule(_module(reader, new).rpartition(".")[0])
                stream_BTH = stream.get(n).to(self._cut.device)
                part(stream_BTH if norm is part else norm(stream_BTH))
        return recorded[reader], recorded[residual]

    def _output(self, template: str, dim: str, new: int, n: int) -> Tensor:
        """The stream after a part [B, T, H]: the stream before it plus the new output."""
        x_BTi, stream_BTH = (
            self._reached[name].get(n).to(self._cut.device) for name in ("input", "stream")
        )
        added_BTH: Tensor = self._cut.model.get_submodule(_module(template, new))(x_BTi)
        if dim in self.setup.family.post_norm:
            norm = self.setup.family.post_norm[dim]
            added_BTH = self._cut.model.get_submodule(_module(norm, new))(added_BTH)
        return stream_BTH + added_BTH * self.setup.family.residual_multiplier

    def _target(self, dim: str, old: int, n: int, before_BTH: Tensor, stream_BTH: Tensor) -> Tensor:
        """Target output of the reader [B, T, H]: (h⁺ − h) + u (h − ĥ), on the kept channels."""
        after = self._before["mlp"] if dim == "heads" else self._streams["dense"]
        after_BTH = widen(after.get(n).to(before_BTH.device))
        hidden = self.setup.plan.hidden
        kept = slice(None) if hidden is None else torch.tensor(hidden, device=after_BTH.device)
        after_BTH, before_BTH = after_BTH[..., kept], before_BTH[..., kept]
        target_BTH = after_BTH - before_BTH + self.setup.upstream * (before_BTH - stream_BTH)
        target_BTH = target_BTH / self.setup.family.residual_multiplier
        if dim in self.setup.family.post_norm:
            name = self.setup.family.post_norm[dim].replace("{layer}", str(old)) + ".weight"
            gain_H = widen(self.setup.checkpoint.tensor(name).to(target_BTH.device))[kept]
            gain_H = gain_H + self.setup.family.norm_offset
            floor = 1e-6 * gain_H.square().mean()
            scale_BT1 = self._scale[dim].get(n).to(target_BTH.device)
            target_BTH = target_BTH * gain_H / (gain_H.square() + floor) * scale_BT1
        return target_BTH

    def _put(self, module: nn.Linear, template: str, old: int, solution: Solution) -> None:
        name = template.replace("{layer}", str(old))
        self.solutions[name] = (solution.ridge, solution.error_before, solution.error_after)
        # Rounded as it will be stored, also if the model computes in more bits.
        stored = getattr(torch, self.setup.checkpoint.dtype(name))
        weight = solution.weight.to(stored)
        if module.bias is not None:
            weight, bias = weight[:, :-1], weight[:, -1]
            module.bias = nn.Parameter(bias.to(module.bias.dtype), requires_grad=False)
            self._weights.put(name.removesuffix("weight") + "bias", bias)
        # Not in place: the old tensor may be memory-mapped from the dense model's file.
        module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
        self._weights.put(name, weight)


class _ReachedError(Exception):
    """Stops a forward pass once it reaches the module whose input is needed."""


@contextmanager
def _inputs(
    model: nn.Module, templates: Iterable[str], layer: int, stop: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """Record the inputs of modules, by template, in this context; the pass ends before `stop`."""
    recorded: dict[str, Tensor] = {}

    def watch(template: str) -> Any:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            recorded[template] = inputs[0]
            if template == stop:
                raise _ReachedError

        return see

    handles = [
        model.get_submodule(_module(template, layer)).register_forward_pre_hook(watch(template))
        for template in templates
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _module(template: str, layer: int) -> str:
    return template.removesuffix(".weight").replace("{layer}", str(layer))


def _joined(module: nn.Linear) -> Tensor:
    """The weight [out, in] in float32 or wider; a bias is added as a last column [out, in + 1]."""
    weight = widen(module.weight)
    return weight if module.bias is None else torch.cat([weight, module.bias[:, None]], dim=1)


def _batches(setup: RepairSetup) -> list[tuple[Subset | None, dict[str, Tensor]]]:
    """The profile's text up to `setup.tokens`, in batches of one subset each."""
    sequences = Sequences.load(setup.profile.sequences_path())
    count = max(VALIDATE_EVERY, setup.tokens // sequences.length)
    selected = sequences.select(range(min(len(sequences), count)))
    return list(fit_and_validate(selected, len(selected), setup.options.batch_size))
