"""What a profile must hold, gathered slowly: plain hooks, float64, one document at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sequences import Sequences, build_sequences

OPTIONS = Options(device="cpu", batch_size=3, order="resident")


class Slow:
    """What every watched place sees, token by token: documents run alone, none is packed."""

    def __init__(self, checkpoint: Checkpoint, sequences: Sequences) -> None:
        self.model = checkpoint.model(torch.float64)
        self.inputs: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.routed: dict[int, list[Tensor]] = defaultdict(list)
        self.sequence = 0
        pre_mlp = "pre_feedforward" if "gemma" in self.model.config.model_type else "post_attention"
        for number, layer in enumerate(self.model.base_model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            self._watch_input(attention.o_proj, f"heads/{number}")
            if "gate" in dict(mlp.named_children()):
                mlp.forward = self._mixture(mlp, number)
            else:
                self._watch_input(mlp.down_proj, f"mlp/{number}")
            mlp_norm = layer.get_submodule(f"{pre_mlp}_layernorm")
            self._watch_input(layer.input_layernorm, f"residual/heads/{number}")
            self._watch_input(mlp_norm, f"residual/mlp/{number}")
            self._watch_output(layer.input_layernorm, f"norm/attention/{number}")
            self._watch_output(mlp_norm, f"norm/mlp/{number}")
            self._watch_input(layer, f"in/{number}")
            self._watch_output(layer, f"out/{number}")
        self._watch_output(self.model.base_model.norm, "norm/final")
        self._run(sequences)

    def _watch_input(self, module: torch.nn.Module, place: str) -> None:
        module.register_forward_pre_hook(lambda _, inputs: self._keep(place, inputs[0]))

    def _mixture(self, mlp: Any, number: int) -> Callable[[Tensor], Tensor]:
        """All experts for every token, written out; those not chosen weigh nothing."""
        experts = mlp.experts
        d = experts.down_proj.shape[-1]

        def forward(x_1TH: Tensor) -> Tensor:
            _, weight_TK, chosen_TK = mlp.gate(x_1TH[0])
            weight_TE = x_1TH.new_zeros(x_1TH.shape[1], len(experts.down_proj))
            weight_TE = weight_TE.scatter(1, chosen_TK, weight_TK.to(x_1TH.dtype))
            gate_and_up = torch.einsum("th,eih->tei", x_1TH[0], experts.gate_up_proj)
            activations = (
                experts.act_fn(gate_and_up[..., :d]) * gate_and_up[..., d:] * weight_TE[..., None]
            )[None]
            self._keep(f"expert_mlp/{number}", activations)
            added = torch.einsum("bted,ehd->bteh", activations, experts.down_proj)
            self._keep(f"experts/{number}", added)
            self.routed[number].append((weight_TE > 0).sum(0))
            return added.sum(2)

        return forward

    def _watch_output(self, module: torch.nn.Module, place: str) -> None:
        module.register_forward_hook(lambda _, inputs, output: self._keep(place, output))

    def _keep(self, place: str, x_1Td: Tensor) -> None:
        self.inputs[place][self.sequence] += list(x_1Td[0].detach())
        self.outputs[place].append(x_1Td)
        x_1Td.requires_grad_(True) if x_1Td.is_leaf else x_1Td.retain_grad()

    def _run(self, sequences: Sequences) -> None:
        for self.sequence, (ids, positions, labels, real) in enumerate(
            zip(
                sequences.input_ids,
                sequences.position_ids,
                sequences.labels,
                sequences.real,
                strict=True,
            )
        ):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for begin, end in pairwise(starts):
                if real[begin]:
                    logits = self.model(ids[None, begin:end], use_cache=False).logits[0]
                    losses = torch.nn.functional.cross_entropy(
                        logits[:-1], labels[begin + 1 : end], ignore_index=-100, reduction="sum"
                    )
                    (losses + 0 * logits.sum()).backward()

    def gradients(self, place: str) -> Tensor:
        """Gradient of the next-token loss by every token's vector at a place [N, d]."""
        gradients = [x.grad for x in self.outputs[place]]
        return torch.cat([g[0] for g in gradients if g is not None])

    def gradient_square_sum(self, dim: str, layer: int | str) -> Tensor:
        by_place = [(place, self.gradients(place)) for place in self.places(dim, layer)]
        if dim == "expert_mlp":  # only tokens that the expert gets
            by_place = [(place, g * (self.rows(place) != 0)) for place, g in by_place]
        return torch.stack([g.square().sum(0) for _, g in by_place]).sum(0)

    def changes(self, dim: str, layer: int | str, width: int) -> list[Tensor]:
        """Per place and token, x·g of each unit of `width` channels [N, units]."""
        if dim == "layers":
            added = self.rows(f"out/{layer}") - self.rows(f"in/{layer}")
            return [(added * self.gradients(f"out/{layer}")).sum(-1, keepdim=True)]
        return [
            (self.rows(place) * self.gradients(place)).unflatten(-1, (-1, width)).sum(-1)
            for place in self.places(dim, layer)
        ]

    def sum(self, dim: str, layer: int | str) -> Tensor:
        return torch.stack([self.rows(place).sum(0) for place in self.places(dim, layer)]).sum(0)

    def rows(self, place: str, sequences: range | list[int] | None = None) -> Tensor:
        """Every token's vector at a place [N, d], of these blocks or all."""
        inputs = self.inputs[place]
        chosen = inputs if sequences is None else sequences
        return torch.stack([x for sequence in chosen for x in inputs[sequence]])

    def places(self, dim: str, layer: int | str) -> list[str]:
        if dim != "hidden":
            return [f"{dim}/{layer}"]
        return [place for place in self.inputs if place.startswith("norm/")]

    def square_sum(self, dim: str, layer: int | str) -> Tensor:
        rows = [self.rows(place) for place in self.places(dim, layer)]
        return torch.stack([x.square().sum(0) for x in rows]).sum(0)

    def mean_abs_square_sum(self, dim: str, layer: int | str) -> Tensor:
        total = 0.0
        for place in self.places(dim, layer):
            for sequence in self.inputs[place]:
                total = total + self.rows(place, [sequence]).abs().mean(0) ** 2
        assert isinstance(total, Tensor)
        return total

    def influence(self, layer: int) -> float:
        before, after = self.rows(f"in/{layer}"), self.rows(f"out/{layer}")
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(before, after, strict=True)]
        return 1 - sum(cosines) / len(cosines)

    def gram(self, dim: str, layer: int, sequences: list[int]) -> Tensor:
        rows = self.rows(f"{dim}/{layer}", sequences)
        residuals = self.rows(f"residual/{dim}/{layer}", sequences)
        total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        for x, r in zip(rows, residuals, strict=True):
            total += torch.outer(x, x) / (r @ r)
        return total


def calibration(checkpoint: Checkpoint, data: DataConfig, samples: int) -> Sequences:
    return build_sequences(data, checkpoint.tokenizer(), "calibration", samples)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Norm-wise closeness: float32 sums in the profile, float64 in the slow version."""
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).norm()) <= rtol * float(expected.norm())
