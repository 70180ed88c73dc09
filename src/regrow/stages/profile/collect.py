"""Collect statistics with hooks while a model, or one layer of it, processes calibration text.

B sequences, T tokens, N real tokens, d channels. Padding is dropped before anything is counted.
Sums over a batch are computed in at least float32, and added up in float64. A batch is not
converted at once: on a CPU it is split into portions whose wide copies stay in the cache, which
halves the time of a sum of squares. On a GPU, portions would only mean more kernel launches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.data.sequences import Subset
from regrow.families import Family
from regrow.layerwise import LAYER
from regrow.profile_folder import Gram
from regrow.runtime import distributed
from regrow.runtime.precision import float32_at_least, widen, widest
from regrow.stages.profile.importance import GRADIENTS, PAIRS, REMOVALS
from regrow.stages.profile.routed import Routed

PORTION = 1 << 17  # elements whose wide copies stay in the cache: half a megabyte in float32
ROWS = 256  # tokens converted to float64 at once


@dataclass
class Batch:
    """The current batch: its real tokens, and its subset for Gram matrices, if any."""

    real_BT: Tensor
    gram: Subset | None = None


@dataclass
class _GramSums:
    sums: dict[Subset, Tensor] = field(default_factory=dict)

    def add(self, subset: Subset, rows_Nd: Tensor) -> None:
        if not self.sums:
            d = rows_Nd.shape[1]
            empty = torch.zeros(d, d, dtype=rows_Nd.dtype, device=rows_Nd.device)
            self.sums = {"fit": empty, "validate": empty.clone()}
        self.sums[subset].addmm_(rows_Nd.T, rows_Nd)


class Collector:
    """Sums for each dimension and layer, over all batches that run while the hooks are attached.

    `needs` maps each observed dimension to the names of the statistics to collect for it. `grams`
    lists the dimensions whose readers' Gram matrices are summed. `head_dim` is the width of a head.
    """

    def __init__(
        self,
        family: Family,
        needs: dict[str, set[str]],
        grams: Iterable[str],
        weighted: bool,
        head_dim: int = 1,
    ) -> None:
        self.family, self.needs, self.head_dim = family, needs, head_dim
        self.gram_dims, self.weighted = tuple(grams), weighted
        self.sums: dict[str, Tensor] = {}
        self.grams: dict[tuple[str, int], _GramSums] = {}
        self.num_layers = 0
        self.batch: Batch | None = None
        self._token_weights: dict[str, Tensor] = {}
        self._streams: list[Tensor] = []
        self._all_real = True

    @property
    def backward(self) -> bool:
        """Whether a statistic needs a backward pass."""
        return any(names & GRADIENTS for names in self.needs.values())

    @property
    def removals(self) -> set[str]:
        """The statistics for which layers are removed one by one."""
        return self.needs.get("layers", set()) & REMOVALS.keys()

    @property
    def pairs(self) -> bool:
        """Whether a statistic compares layers with each other."""
        return bool(self.needs.get("layers", set()) & PAIRS)

    def start(self, batch: Batch) -> None:
        """Set the batch that runs next."""
        self.batch, self._streams = batch, []
        self._all_real = bool(batch.real_BT.all())  # read once: on a GPU this waits for the device

    def attach(self, model: PreTrainedModel, layers: Sequence[int], final: bool) -> list[Any]:
        """Hook the modules of `layers` (and, if `final`, the last norm); returns the handles."""
        handles, self.num_layers = [], len(layers)
        config = model.config.to_dict()
        having = {
            dim: self.family.layers_of(dim, config) if dim in self.family.observe else []
            for dim in ("mlp", "heads", "experts")
        }
        for layer in layers:
            for dim in ("mlp", "heads"):
                if layer in having[dim]:
                    handles += self._attach_reader(model, dim, layer)
            if layer in having["experts"]:
                handles += self._attach_experts(model, layer)
            if "hidden" in self.needs:
                for template in self._hidden_modules(per_layer=True):
                    module = model.get_submodule(template.format(layer=layer))
                    handles.append(module.register_forward_hook(self._see_hidden))
            if self.needs.get("layers"):
                module = model.get_submodule(LAYER.format(layer=layer))
                handles.append(module.register_forward_hook(self._layer_hook(layer)))
        if final and "hidden" in self.needs:
            for name in self._hidden_modules(per_layer=False):
                handles.append(model.get_submodule(name).register_forward_hook(self._see_hidden))
        return handles

    def take_grams(self, layer: int) -> dict[str, Gram]:
        """Remove and return the Gram matrices of one layer, by dimension, over all processes."""
        own: dict[str, Tensor] = {}
        for dim in self.gram_dims:
            sums = self.grams.pop((dim, layer), _GramSums()).sums
            own |= {f"{dim}/{subset}": sum_dd for subset, sum_dd in sums.items()}
        whole = distributed.sum_over_ranks(own)
        return {
            dim: Gram(fit=whole[f"{dim}/fit"].cpu(), validate=whole[f"{dim}/validate"].cpu())
            for dim in self.gram_dims
            if f"{dim}/fit" in whole
        }

    def _hidden_modules(self, per_layer: bool) -> list[str]:
        return [name for name in self.family.observe["hidden"] if ("{layer}" in name) == per_layer]

    def _attach_reader(self, model: nn.Module, dim: str, layer: int) -> list[Any]:
        wants_gram = dim in self.gram_dims
        if dim not in self.needs and not wants_gram:
            return []
        handles = []
        if wants_gram and self.weighted:
            name = self.family.residual[dim].format(layer=layer)
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._residual_hook(dim)))
        (template,) = self.family.observe[dim]
        module = model.get_submodule(template.format(layer=layer))
        handles.append(module.register_forward_pre_hook(self._reader_hook(dim, layer)))
        return handles

    def _attach_experts(self, model: nn.Module, layer: int) -> list[Any]:
        if not self.needs.keys() & {"experts", "expert_mlp"}:
            return []
        (template,) = self.family.observe["experts"]
        module = model.get_submodule(template.format(layer=layer))

        def see(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            assert self.batch is not None
            routed = Routed(module, self.batch.real_BT, *inputs)
            self._add_all(layer, routed.statistics(self.needs))
            if self.backward:
                output.register_hook(
                    lambda g: self._add_all(layer, routed.gradients(self.needs, g.detach()))
                )

        return [module.register_forward_hook(see)]

    def _add_all(self, layer: int, sums: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            self._add(f"{name}/{layer}", value)

    def _residual_hook(self, dim: str) -> Any:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert self.batch is not None
            if self.batch.gram is not None:
                rows_Nd = self._real(inputs[0].detach()).float()
                # The lower bound keeps the weight of an all-zero residual finite.
                norm = torch.linalg.vector_norm(rows_Nd, dim=-1, keepdim=True)
                self._token_weights[dim] = 1.0 / norm.clamp_min(1e-6)

        return see

    def _reader_hook(self, dim: str, layer: int) -> Any:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert self.batch is not None
            if dim in self.needs:
                self._add_activations(f"{dim}/{layer}", self.needs[dim], inputs[0])
            if dim in self.gram_dims and self.batch.gram is not None:
                rows_Nd = widen(self._real(inputs[0].detach()))
                if self.weighted:
                    rows_Nd = rows_Nd * self._token_weights.pop(dim)
                sums = self.grams.setdefault((dim, layer), _GramSums())
                sums.add(self.batch.gram, rows_Nd)

        return see

    def _see_hidden(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._add_activations("hidden/all", self.needs["hidden"], output)

    def _layer_hook(self, layer: int) -> Any:
        place, names = f"layers/{layer}", self.needs["layers"]

        def see(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            before, after = inputs[0].detach(), output.detach()
            if "input_output_distance" in names:
                distance = cosine_distance_sum(self._real(before), self._real(after))
                self._add(f"input_output_distance/{place}", distance)
            if names & PAIRS:
                self._compare(before, after)
            if names & GRADIENTS:
                added = after - before
                output.register_hook(lambda g: self._add_gradients(place, names, added, g, 1))

        return see

    def _compare(self, before: Tensor, after: Tensor) -> None:
        """Collect the residual streams; after the last layer, compare them in pairs."""
        if not self._streams:
            self._streams.append(self._real(before))
        self._streams.append(self._real(after))
        if len(self._streams) > self.num_layers:
            for last, row in enumerate(layer_distances(self._streams)):
                self._add(f"angular_distance/layers/{last}", row)
            self._streams = []

    def _add_activations(self, place: str, names: set[str], x_BTd: Tensor) -> None:
        if names & GRADIENTS:
            seen, units = x_BTd.detach(), self._units(place, x_BTd.shape[-1])
            x_BTd.register_hook(lambda g: self._add_gradients(place, names, seen, g, units))
        x_BTd = x_BTd.detach()
        if "sum" in names:
            self._add(f"sum/{place}", self._real(x_BTd).sum(0, dtype=float32_at_least(x_BTd.dtype)))
        if "square_sum" in names:
            self._add(f"square_sum/{place}", square_sum(self._real(x_BTd)))
        if "mean_abs_square_sum" in names:
            assert self.batch is not None
            real_BT1 = self.batch.real_BT[..., None]
            size_BTd = x_BTd.abs() if self._all_real else x_BTd.abs() * real_BT1
            sums_Bd = size_BTd.sum(1, dtype=float32_at_least(x_BTd.dtype))
            means_Bd = sums_Bd / real_BT1.sum(1).clamp_min(1)
            self._add(f"mean_abs_square_sum/{place}", means_Bd.square().sum(0))

    def _units(self, place: str, channels: int) -> int:
        return channels // self.head_dim if place.startswith("heads/") else channels

    def _add_gradients(
        self, place: str, names: set[str], x_BTd: Tensor, g_BTd: Tensor, units: int
    ) -> None:
        """Add statistics of x and of the loss's gradient with respect to x (backward pass)."""
        x_Nd, g_Nd = (widen(self._real(t)) for t in (x_BTd, g_BTd.detach()))
        if "gradient_square_sum" in names:
            self._add(f"gradient_square_sum/{place}", g_Nd.square().sum(0))
        if names & {"taylor_abs_sum", "taylor_square_sum"}:
            change_Nu = (x_Nd * g_Nd).unflatten(-1, (units, -1)).sum(-1)
            for name, value in (
                ("taylor_abs_sum", change_Nu.abs()),
                ("taylor_square_sum", change_Nu.square()),
            ):
                if name in names:
                    self._add(f"{name}/{place}", value.sum(0))

    def _add(self, key: str, value: Tensor) -> None:
        value = value.to(widest(value.device))  # the order of the batches then hardly matters
        self.sums[key] = value if key not in self.sums else self.sums[key] + value

    def _real(self, x_BTd: Tensor) -> Tensor:
        assert self.batch is not None
        return x_BTd.flatten(0, 1) if self._all_real else x_BTd[self.batch.real_BT]


def square_sum(rows_Nd: Tensor) -> Tensor:
    """Σ_tokens x² [d]."""
    # vector_norm over the first dimension takes ten times as long on CPUs.
    parts = [part.square().sum(0) for (part,) in _portions(rows_Nd)]
    return torch.stack(parts).sum(0)


def cosine_distance_sum(before_Nd: Tensor, after_Nd: Tensor) -> Tensor:
    """Σ_tokens 1 − cos(before, after), shape [1]."""
    parts = [
        (1 - torch.cosine_similarity(before, after, dim=-1)).sum()
        for before, after in _portions(before_Nd, after_Nd)
    ]
    return torch.stack(parts).sum()[None]


def _portions(*tensors_Nd: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor, one portion at a time, in a wider dtype."""
    rows, channels = tensors_Nd[0].shape
    count = max(1, PORTION // channels) if tensors_Nd[0].device.type == "cpu" else max(1, rows)
    for parts in zip(*(x_Nd.split(count) for x_Nd in tensors_Nd), strict=True):
        yield tuple(map(widen, parts))


def layer_distances(streams: Sequence[Tensor]) -> Tensor:
    """Σ_tokens arccos(cos(x^first, x^(last+1))) / π for all groups of consecutive layers [L, L].

    `streams` are the L + 1 residual streams [N, H]: the embedding, then each layer's output. The
    entry [last, first] is for the layers first to last, and 0 if first > last. A token whose stream
    is all zero is treated as orthogonal to every other.
    """
    layers = len(streams) - 1
    # In float32, layers that change nothing would have an angle up to 5e-4 from rounding.
    dtype = widest(streams[0].device)
    total = torch.zeros(layers, layers, dtype=dtype, device=streams[0].device)
    for rows in zip(*(stream.split(ROWS) for stream in streams), strict=True):
        x_NDH = torch.nn.functional.normalize(torch.stack(rows, 1).to(dtype), dim=-1)
        cosine_NDD = (x_NDH @ x_NDH.transpose(1, 2)).clamp_(-1, 1)
        total += cosine_NDD[:, 1:, :-1].arccos_().sum(0)
    return total.div_(math.pi).tril_()
