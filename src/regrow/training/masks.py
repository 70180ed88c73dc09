"""Hard-concrete masks on the units of a model, and the Lagrangian that leads them to a shape.

Louizos, Welling and Kingma, 2018, arXiv:1712.01312 (the masks); Xia et al., 2023, arXiv:2310.06694,
"Sheared LLaMA" (masks on layers, heads, MLP and hidden channels, and a target for each of them).

A unit's mask is z = min(1, max(0, s (ζ − γ) + γ)) with s = σ((log u − log(1 − u) + log α) / β), u
uniform in (0, 1), β = 2/3, γ = −0.1, ζ = 1.1. It is open with probability
P(z > 0) = σ(log α − β log(−γ / ζ)), which is differentiable in log α.

Masks act on activations, by the family's table: MLP channels and heads at the input of the
projection that reads them, hidden channels at everything that is written to the residual stream,
layers at what a layer adds to the stream. With masks of 0 and 1 the model is the cut one.

Shapes: U units of one dimension (in one layer), J constraints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.families import Family
from regrow.training.frozen_layers import decoder_layers

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
START = 3.0
"""log α at the beginning: nearly all masks are 1, so that training begins with the whole model."""
WHOLE = "all"
"""The layer of a dimension of the whole model, as in a profile."""
Sizes = dict[str, int]


def sampled(log_alpha_U: Tensor, uniform_U: Tensor) -> Tensor:
    """The masks [U] in [0, 1] for uniform numbers in (0, 1)."""
    noise_U = uniform_U.log() - (-uniform_U).log1p()
    return _stretched(((noise_U + log_alpha_U) / BETA).sigmoid())


def certain(log_alpha_U: Tensor) -> Tensor:
    """The masks [U] without noise: those of s = σ(log α)."""
    return _stretched(log_alpha_U.sigmoid())


def open_share(log_alpha_U: Tensor) -> Tensor:
    """P(z > 0) of each mask [U]: the expected L0 norm is their sum."""
    return (log_alpha_U - BETA * math.log(-GAMMA / ZETA)).sigmoid()


def _stretched(s_U: Tensor) -> Tensor:
    return (s_U * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def lagrangian(share_J: Tensor, target_J: Tensor, linear_J: Tensor, quadratic_J: Tensor) -> Tensor:
    """Σ_j λ_j (share_j − target_j) + φ_j (share_j − target_j)², of shares of open masks.

    The masks descend it and the multipliers λ, φ ascend it.
    """
    gap_J = share_J - target_J
    return (linear_J * gap_J + quadratic_J * gap_J.square()).sum()


class Masks(nn.Module):
    """The masks of all dimensions that shrink from `before` to `after`, and their multipliers.

    `log_alphas` has a tensor [U] for each `dim/layer`. Query heads are masked inside their KV head,
    so that each KV head keeps the same number of them, and a masked KV head masks its query heads.
    All multipliers λ begin at 0, and all φ at `penalty`.
    """

    def __init__(
        self, family: Family, config: dict[str, Any], after: Sizes, penalty: float = 0.0
    ) -> None:
        super().__init__()
        self.family, self.before = family, family.sizes(config)
        self.after = {**self.before, **after}
        self.config, self.values = config, dict[str, Tensor]()
        self.log_alphas = nn.ParameterDict()
        rows: dict[str, int] = {}
        for dim, layer, groups in self._places():
            key = f"{dim}/{layer}"
            self.log_alphas[key] = nn.Parameter(torch.full((self.before[dim],), START))
            rows[key] = groups
        self.rows = rows
        self.targets = [
            self.share_of(key.split("/")[0]) for key, n in rows.items() for _ in range(n)
        ]
        self.linear_J = nn.Buffer(torch.zeros(len(self.targets)))
        self.quadratic_J = nn.Buffer(torch.full((len(self.targets),), penalty))

    def _places(self) -> Iterator[tuple[str, str, int]]:
        """Dimension, layer and number of constraints of each mask tensor."""
        for dim in ("layers", "hidden"):
            if self.after[dim] < self.before[dim]:
                yield dim, WHOLE, 1
        for dim in ("mlp", "kv_heads", "heads"):
            if dim in self.before and self.share_of(dim) < 1:
                for layer in self.family.layers_of(dim, self.config):
                    yield dim, str(layer), self.before["kv_heads"] if dim == "heads" else 1

    def share_of(self, dim: str) -> float:
        """The share of units to keep; of query heads, the share inside a KV head that is kept."""
        share = self.after[dim] / self.before[dim]
        if dim == "heads":
            share /= self.after["kv_heads"] / self.before["kv_heads"]
        return share

    def shares(self) -> Tensor:
        """The expected share of open masks [J] under each constraint."""
        shares = [
            open_share(self.log_alphas[key]).view(groups, -1).mean(1)
            for key, groups in self.rows.items()
        ]
        return torch.cat(shares)

    def loss(self, progress: float) -> Tensor:
        """The Lagrangian; its targets fall linearly from 1 and are the final ones at progress 1."""
        return lagrangian(self.shares(), self._target(progress), self.linear_J, self.quadratic_J)

    @torch.no_grad()
    def ascend(self, rate: float, progress: float) -> None:
        """Raise the multipliers by `rate` times the Lagrangian's gradient."""
        gap_J = self.shares() - self._target(progress)
        self.linear_J.add_(rate * gap_J)
        self.quadratic_J.add_(rate * gap_J.square())

    def _target(self, progress: float) -> Tensor:
        return 1 - min(1.0, progress) * (1 - self.linear_J.new_tensor(self.targets))

    def draw(self, generator: torch.Generator | None) -> None:
        """Set the masks that the model uses next: drawn, or those without noise."""
        self.values = {}
        for key, log_alpha_U in self.log_alphas.items():
            if generator is None:
                self.values[key] = certain(log_alpha_U)
                continue
            uniform_U = torch.rand(log_alpha_U.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
            self.values[key] = sampled(log_alpha_U, uniform_U.to(log_alpha_U))

    def set(self, values: dict[str, Tensor]) -> None:
        """Use these masks [U] next, by `dim/layer`."""
        self.values = values

    def chosen(self) -> dict[str, Tensor]:
        """Masks of 0 and 1 that keep as many units as the target says: those of highest α."""
        chosen = {}
        for key, log_alpha_U in self.log_alphas.items():
            groups = log_alpha_U.detach().view(self.rows[key], -1)
            count = round(self.share_of(key.split("/")[0]) * groups.shape[1])
            best = groups.sort(dim=1, descending=True, stable=True).indices[:, :count]
            chosen[key] = torch.zeros_like(groups).scatter(1, best, 1.0).view(-1)
        return chosen

    def of_mlp(self, layer: int) -> Tensor:
        """The masks of the MLP channels of a layer."""
        return self.values[f"mlp/{layer}"]

    def of_heads(self, layer: int) -> Tensor:
        """The masks of the channels of a layer's query heads, times those of their KV heads."""
        group = self.before["heads"] // self.before["kv_heads"]
        mask_U = torch.ones(())
        if (heads_U := self.values.get(f"heads/{layer}")) is not None:
            mask_U = heads_U
        if (kv_U := self.values.get(f"kv_heads/{layer}")) is not None:
            mask_U = mask_U.to(kv_U) * kv_U.repeat_interleave(group)
        return mask_U.repeat_interleave(self.before["head_dim"])


@contextmanager
def masked(model: PreTrainedModel, masks: Masks) -> Iterator[None]:
    """Let the model use the masks' current values in every forward pass inside the context."""
    handles = [*_width_hooks(model, masks), *_layer_hooks(model, masks)]
    if "hidden/all" in masks.log_alphas:
        for name in writers(masks.family, masks.config):
            hook = _times_output(lambda: masks.values["hidden/all"])
            handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def writers(family: Family, config: dict[str, Any]) -> list[str]:
    """The modules whose output is written to the residual stream, by the family's table."""
    names = [family.embedding.removesuffix(".weight")]
    for template, row in family.tensors.items():
        writes = len(row.axes) == 2 and row.axes[0] == "hidden"
        if writes and "{expert}" not in template:
            places = family.places(template, config)
            names += [place.name.removesuffix(".weight") for place in places]
    if "experts" in family.observe:
        layers = family.layers_of("experts", config)
        names += [name.format(layer=n) for name in family.observe["experts"] for n in layers]
    return names


def _width_hooks(model: PreTrainedModel, masks: Masks) -> Iterator[Any]:
    """Hooks on the projections that read MLP channels and heads."""
    family = masks.family
    for dim in ("mlp", "heads"):
        names = ("mlp",) if dim == "mlp" else ("heads", "kv_heads")
        for layer in family.layers_of(dim, masks.config) if dim in family.observe else ():
            if not any(f"{name}/{layer}" in masks.log_alphas for name in names):
                continue
            mask = partial(masks.of_mlp if dim == "mlp" else masks.of_heads, layer)
            for template in family.observe[dim]:
                module = model.get_submodule(template.format(layer=layer))
                yield module.register_forward_pre_hook(_times_input(mask))


def _layer_hooks(model: PreTrainedModel, masks: Masks) -> Iterator[Any]:
    """Hooks on decoder layers: the stream x becomes x + z (layer(x) − x)."""
    if "layers/all" not in masks.log_alphas:
        return
    for number, layer in enumerate(decoder_layers(model)):

        def scale(module: Any, given: Any, named: Any, made: Any, n: int = number) -> Any:
            x = given[0] if given else named["hidden_states"]
            z = masks.values["layers/all"][n].to(x.dtype)
            if isinstance(made, tuple):
                return (x + z * (made[0] - x), *made[1:])
            return x + z * (made - x)

        yield layer.register_forward_hook(scale, with_kwargs=True)


def _times_input(mask: Callable[[], Tensor]) -> Callable[..., Any]:
    def hook(module: Any, given: Any) -> Any:
        return (given[0] * mask().to(given[0].dtype), *given[1:])

    return hook


def _times_output(mask: Callable[[], Tensor]) -> Callable[..., Any]:
    def hook(module: Any, given: Any, made: Any) -> Any:
        return made * mask().to(made.dtype)

    return hook
