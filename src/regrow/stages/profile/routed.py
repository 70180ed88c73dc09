"""Activations of the experts of one layer, for the tokens that the router sends to them.

transformers stacks the experts and has no module for each of them, so their activations are
recomputed from the tokens and the routing. A token that is not sent to an expert counts as zero for
that expert.

N tokens (B sequences of T), n of them sent to one expert, K experts per token, E experts, H hidden
channels, d channels inside an expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from regrow.runtime.precision import float32_at_least

FREQUENCY = frozenset({"routed_tokens"})
"""Statistics of experts that need no activations."""


class Share(NamedTuple):
    """The part of a batch that one expert processes: its tokens, and x, the input of its down
    projection times the router's weight for the token."""

    expert: int
    tokens_n: Tensor
    x_nd: Tensor
    down_Hd: Tensor


class Routed:
    """A batch, given by the inputs of the module that computes all experts of a layer.

    `module` has gate_up_proj [E, 2d, H], down_proj [E, H, d] and act_fn; an expert's output is the
    router's weight times down(act(gate(h)) * up(h)). Padding is sent to no expert.
    """

    def __init__(
        self, module: Any, real_BT: Tensor, hidden_NH: Tensor, chosen_NK: Tensor, weight_NK: Tensor
    ) -> None:
        self.module, self.real_BT = module, real_BT
        self.hidden_NH, self.weight_NK = hidden_NH.detach(), weight_NK.detach()
        self.chosen_NK = chosen_NK.masked_fill(~real_BT.flatten()[:, None], -1)

    def statistics(self, needs: Mapping[str, set[str]]) -> dict[str, Tensor]:
        """Sums over the tokens, by `statistic/dim`: [E, 1] for experts, [E, d] for expert_mlp."""
        of_experts, of_channels = (needs.get(dim, set()) for dim in ("experts", "expert_mlp"))
        sums: dict[str, list[Tensor]] = defaultdict(list)
        if "routed_tokens" in of_experts:
            count = len(self.module.down_proj)
            tokens_E = torch.stack([(self.chosen_NK == e).sum() for e in range(count)])
            sums["routed_tokens/experts"] = list(tokens_E[:, None])
        if of_channels or of_experts - FREQUENCY:
            for share in self._shares():
                _append(sums, "expert_mlp", self._of_channels(share, of_channels))
                _append(sums, "experts", self._of_output(share, of_experts))
        return {name: torch.stack(values) for name, values in sums.items()}

    def gradients(self, needs: Mapping[str, set[str]], g_NH: Tensor) -> dict[str, Tensor]:
        """Sums that depend on the gradient of the loss by the experts' output, in the same format.

        The output is linear in x, so the gradient by x is the gradient by the output times `down`.
        """
        sums: dict[str, list[Tensor]] = defaultdict(list)
        for share in self._shares():
            g_nH = g_NH[share.tokens_n].to(share.x_nd.dtype)
            g_nd = g_nH @ share.down_Hd
            change_nd = share.x_nd * g_nd
            values = {"gradient_square_sum": g_nd.square(), **_changes(change_nd)}
            _append(sums, "expert_mlp", _sums(values, needs.get("expert_mlp", set())))
            values = _changes(change_nd.sum(-1, keepdim=True))
            _append(sums, "experts", _sums(values, needs.get("experts", set())))
        return {name: torch.stack(values) for name, values in sums.items()}

    def _shares(self) -> Iterator[Share]:
        exact = float32_at_least(self.hidden_NH.dtype)
        both = zip(self.module.gate_up_proj, self.module.down_proj, strict=True)
        for expert, (gate_up, down_Hd) in enumerate(both):
            tokens_n, place_n = (self.chosen_NK == expert).nonzero(as_tuple=True)
            gate_nd, up_nd = linear(self.hidden_NH[tokens_n], gate_up.detach()).chunk(2, -1)
            x_nd = (self.module.act_fn(gate_nd) * up_nd).to(exact)
            x_nd = x_nd * self.weight_NK[tokens_n, place_n, None].to(exact)
            yield Share(expert, tokens_n, x_nd, down_Hd.detach().to(exact))

    def _of_channels(self, share: Share, names: set[str]) -> dict[str, Tensor]:
        sums = _sums({"sum": share.x_nd, "square_sum": share.x_nd.square()}, names)
        if "mean_abs_square_sum" in names:
            sequences, length = self.real_BT.shape
            sums_Bd = share.x_nd.new_zeros(sequences, share.x_nd.shape[1])
            sums_Bd.index_add_(0, share.tokens_n // length, share.x_nd.abs())
            means_Bd = sums_Bd / self.real_BT.sum(1, keepdim=True).clamp_min(1)
            sums["mean_abs_square_sum"] = means_Bd.square().sum(0)
        return sums

    def _of_output(self, share: Share, names: set[str]) -> dict[str, Tensor]:
        if not names & {"routed_norm_sum", "square_sum"}:
            return {}
        norm_n1 = linear(share.x_nd, share.down_Hd).norm(dim=-1, keepdim=True)
        return _sums({"routed_norm_sum": norm_n1, "square_sum": norm_n1.square()}, names)


def _changes(change_nu: Tensor) -> dict[str, Tensor]:
    return {"taylor_abs_sum": change_nu.abs(), "taylor_square_sum": change_nu.square()}


def _sums(values: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: value.sum(0) for name, value in values.items() if name in names}


def _append(sums: dict[str, list[Tensor]], dim: str, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        sums[f"{name}/{dim}"].append(value)
