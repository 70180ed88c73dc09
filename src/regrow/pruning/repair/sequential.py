"""Repair layer after layer: each is re-solved for what really reaches it in the cut model.

The dense and the cut model run over the profile's text side by side, one layer of each at a time.
What a block adds to the residual stream h comes out of its last projection (`o_proj`, `down_proj`)
with input x̂ and stream ĥ before it in the cut model; in the dense model the block takes the stream
from h to h⁺. The new weights are

    W' = argmin Σ_t w_t |W' x̂ − (h⁺ − h) − u (h − ĥ)|² + λ |W' − W|²,   w_t = 1/|h|²

so that at u = 1 (`Job.upstream`) the cut model's stream comes back to the dense one's after every
block, whatever was lost before it, and layers that were dropped are made up for by the one before
them: its h⁺ is the stream that reaches the next kept layer. λ is chosen by the error on held-out
blocks. Biases are solved with the weights where the family has them. Where a norm stands between
projection and stream (Gemma 3) its inverse, with the dense output's scale, is put on the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from regrow.data.sequences import VALIDATE_EVERY, Sequences, held_out
from regrow.layerwise import LayerByLayer, Spill
from regrow.pruning.cut import cut_config, cut_tensor, new_name
from regrow.pruning.repair import RepairSetup, Solutions
from regrow.pruning.repair._ridge import Moments, Solution, refit
from regrow.runtime.precision import widen
from regrow.runtime.progress import Progress, progress

GRAMS = False
RIDGES = (1e-1, 3e-1, 1.0, 3.0, 10.0)  # errors that add up from layer to layer ask for more
SEQUENCES = ("heads", "mlp")  # the blocks of a layer by what their last projection reads, in order


def repair(job: RepairSetup, ridges: tuple[float, ...] = RIDGES) -> Sequential:
    """New weights, solved here and now; they wait in `job.work` until they are asked for."""
    walk = Sequential(job, ridges)
    walk.run()
    return walk


def work_bytes(sizes: dict[str, int], tokens: int) -> int:
    """Four residual streams of the text in two bytes, and the solved projections in four."""
    reads = sizes["heads"] * sizes["head_dim"] + sizes.get("mlp", 0)
    return 4 * 2 * tokens * sizes["hidden"] + 4 * sizes["layers"] * sizes["hidden"] * reads


class Sequential:
    """The dense and the cut model side by side, one layer of each, and what was solved so far."""

    @torch.no_grad()
    def __init__(self, job: RepairSetup, ridges: tuple[float, ...]) -> None:
        # Layers know nothing of the vocabulary, and the profile's text is in the parent's tokens.
        whole = {**job.plan.after, "vocab": job.plan.before["vocab"]}
        plan = job.plan.model_copy(update={"vocab": None, "after": whole})
        self.job = job = replace(job, plan=plan)
        self.ridges = ridges
        self.solutions: Solutions = {}
        self._weights = Spill(job.work / "weights")
        self._streams = {name: Spill(job.work / name) for name in ("dense", "cut")}
        self._before = {dim: Spill(job.work / f"before-{dim}") for dim in SEQUENCES}
        self._scale = {dim: Spill(job.work / f"scale-{dim}") for dim in SEQUENCES}
        self._batches = _batches(job)
        checkpoint, family = job.checkpoint, job.family
        device, dtype = job.options.torch_device(), checkpoint.compute_dtype()
        self._dense = LayerByLayer.of(checkpoint, family, device)
        names = {new_name(n, plan, family, checkpoint.config): n for n in checkpoint.names()}
        self._parents = {new: name for new, name in names.items() if new is not None}
        config = type(self._dense.model.config).from_dict(
            cut_config(checkpoint.config, plan, family)
        )
        like = self._dense if plan.hidden is None else None  # then the embeddings are equal
        self._cut = LayerByLayer(
            family, config, self._parents, self._read_cut, dtype, device, like=like
        )

    def __call__(self, name: str, kept: Tensor) -> Tensor:
        """The tensor to write for the parent's tensor `name`, whose cut form is `kept`."""
        return self._weights.get(name).to(kept.dtype) if name in self._weights else kept

    @torch.no_grad()
    def run(self) -> None:
        """Solve every layer, from the first to the last."""
        kept, layers = self.job.plan.kept_layers(), self.job.plan.before["layers"]
        tokens = sum(int(inputs["real"].sum()) for _, inputs in self._batches)
        with progress("repair", tokens * (layers + len(kept))) as counter:
            self._run_dense(range(kept[0]), counter)
            for new, (old, following) in enumerate(pairwise([*kept, layers])):
                self._run_dense([old], counter, watched=True)
                self._run_dense(range(old + 1, following), counter)
                self._solve_layer(new, old)
                counter.advance(tokens)

    def _run_dense(self, layers: Iterable[int], counter: Progress, watched: bool = False) -> None:
        """Take the dense stream through these layers; note what came before each block if asked."""
        stream, family = self._streams["dense"], self.job.family
        for layer in layers:
            names = [*family.residual.values(), *family.post_norm.values()] if watched else []
            with self._dense.resident(layer), _inputs(self._dense.model, names, layer) as seen:
                for n, (_, inputs) in enumerate(self._batches):
                    stream.put(n, self._dense.step(inputs, stream.get(n) if layer else None))
                    for dim in SEQUENCES if watched else ():
                        self._before[dim].put(n, seen[family.residual[dim]])
                        if dim in family.post_norm:
                            y_BTH = widen(seen[family.post_norm[dim]])
                            self._scale[dim].put(n, y_BTH.square().mean(-1, keepdim=True).sqrt())
                    counter.advance(int(inputs["real"].sum()))

    def _solve_layer(self, new: int, old: int) -> None:
        """Re-solve the blocks of the cut model's layer `new`, then take its stream through it."""
        stream = self._streams["cut"]
        with self._cut.resident(new):
            for dim in SEQUENCES:
                for template in self.job.family.readers(dim):
                    if template.replace("{layer}", str(new)) in self._parents:
                        self._solve_reader(template, dim, new, old)
            for n, (_, inputs) in enumerate(self._batches):
                stream.put(n, self._cut.step(inputs, stream.get(n) if new else None))

    def _solve_reader(self, template: str, dim: str, new: int, old: int) -> None:
        module = self._cut.model.get_submodule(_module(template, new))
        assert isinstance(module, nn.Linear)
        fit, validate = (Moments.empty(_joined(module)) for _ in range(2))
        for n, (unseen, inputs) in enumerate(self._batches):
            x_BTi, stream_BTH = self._reach(template, dim, new, n, inputs)
            before_BTH = widen(self._before[dim].get(n).to(x_BTi.device))
            target_BTH = self._target(dim, old, n, before_BTH, stream_BTH)
            real = inputs["real"].to(x_BTi.device)
            # A floor keeps an all-zero residual from weighing infinitely much.
            weight_N1 = 1 / before_BTH[real].norm(dim=-1, keepdim=True).clamp_min(1e-6)
            x_Ni = widen(x_BTi[real])
            if module.bias is not None:
                x_Ni = torch.cat([x_Ni, torch.ones_like(x_Ni[:, :1])], dim=1)
            moments = validate if unseen else fit
            moments.add(x_Ni * weight_N1, target_BTH[real] * weight_N1)
        self._put(module, template, old, refit(_joined(module), fit, validate, self.ridges))

    def _reach(
        self, template: str, dim: str, new: int, n: int, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The input of the reader, and the stream that its block's output is added to."""
        reader, residual = template.removesuffix(".weight"), self.job.family.residual[dim]
        hidden = self._streams["cut"].get(n) if new else None
        modules = [reader, residual]
        with _inputs(self._cut.model, modules, new, reader) as seen, suppress(_ReachedError):
            self._cut.step(inputs, hidden)
        return seen[reader], widen(seen[residual])

    def _target(self, dim: str, old: int, n: int, before_BTH: Tensor, stream_BTH: Tensor) -> Tensor:
        """What the reader should put out [B, T, H]: (h⁺ − h) + u (h − ĥ), on the kept channels."""
        after = self._before["mlp"] if dim == "heads" else self._streams["dense"]
        after_BTH = widen(after.get(n).to(before_BTH.device))
        hidden = self.job.plan.hidden
        kept = slice(None) if hidden is None else torch.tensor(hidden, device=after_BTH.device)
        after_BTH, before_BTH = after_BTH[..., kept], before_BTH[..., kept]
        target_BTH = after_BTH - before_BTH + self.job.upstream * (before_BTH - stream_BTH)
        if dim in self.job.family.post_norm:
            name = self.job.family.post_norm[dim].replace("{layer}", str(old)) + ".weight"
            gain_H = widen(self.job.checkpoint.tensor(name).to(target_BTH.device))[kept]
            gain_H = gain_H + self.job.family.norm_offset
            floor = 1e-6 * gain_H.square().mean()
            scale_BT1 = self._scale[dim].get(n).to(target_BTH.device)
            target_BTH = target_BTH * gain_H / (gain_H.square() + floor) * scale_BT1
        return target_BTH

    def _put(self, module: nn.Linear, template: str, old: int, solution: Solution) -> None:
        name = template.replace("{layer}", str(old))
        self.solutions[name] = (solution.ridge, solution.error_before, solution.error_after)
        weight = solution.weight
        if module.bias is not None:
            weight, bias = weight[:, :-1], weight[:, -1]
            module.bias = nn.Parameter(bias.to(module.bias.dtype), requires_grad=False)
            self._weights.put(name.removesuffix("weight") + "bias", bias)
        # Not in place: what was read may be the parent's file, mapped.
        module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
        self._weights.put(name, weight)

    def _read_cut(self, name: str) -> Tensor:
        job, parent = self.job, self._parents[name]
        tensor = job.checkpoint.tensor(parent)
        found = cut_tensor(parent, tensor, job.plan, job.family, job.checkpoint.config)
        assert found is not None and found[0] == name
        return found[1]


class _ReachedError(Exception):
    """Ends a forward pass at the module that it was run for."""


@contextmanager
def _inputs(
    model: nn.Module, templates: Iterable[str], layer: int, stop: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """What modules get, by template, while this is open; the pass ends before `stop`."""
    seen: dict[str, Tensor] = {}

    def watch(template: str) -> Any:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[template] = inputs[0]
            if template == stop:
                raise _ReachedError

        return see

    handles = [
        model.get_submodule(_module(template, layer)).register_forward_pre_hook(watch(template))
        for template in templates
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _module(template: str, layer: int) -> str:
    return template.removesuffix(".weight").replace("{layer}", str(layer))


def _joined(module: nn.Linear) -> Tensor:
    """The weight [out, in] in float32 or wider; a bias is a last column [out, in + 1]."""
    weight = widen(module.weight)
    return weight if module.bias is None else torch.cat([weight, module.bias[:, None]], dim=1)


def _batches(job: RepairSetup) -> list[tuple[bool, dict[str, Tensor]]]:
    """The profile's text in batches, each all for the fit or all held out."""
    sequences = Sequences.load(job.profile.sequences_path())
    count = min(len(sequences), max(VALIDATE_EVERY, job.tokens // sequences.input_ids.shape[1]))
    size = job.options.batch_size
    found = []
    for unseen in (False, True):
        numbers = [number for number in range(count) if held_out(number) == unseen]
        for begin in range(0, len(numbers), size):
            some = numbers[begin : begin + size]
            inputs = {
                "input_ids": sequences.input_ids[some],
                "position_ids": sequences.position_ids[some],
                "real": sequences.real[some],
            }
            found.append((unseen, inputs))
    return found
