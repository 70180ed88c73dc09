"""Train the resident layer of a model so that its output comes near a given stream.

Shapes: B sequences, T tokens, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from regrow.layerwise import LayerByLayer
from regrow.runtime.precision import widen
from regrow.runtime.progress import Progress
from regrow.sparsity import zeros
from regrow.stages.reconstruct.streams import Streams
from regrow.training.rates import is_attention

if TYPE_CHECKING:
    from regrow.stages.reconstruct import ReconstructConfig

LEAST_SIZE = 1e-3
"""The least root mean square of a weight by which its learning rate is multiplied."""
StreamOf = Callable[[int], Tensor]
"""A stream [B, T, H] by the number of its batch."""


class Target(NamedTuple):
    """What the layer's output is compared with."""

    stream: StreamOf
    """The stream that it should have."""
    weight_H: Tensor
    """c: how much the squared error of each channel counts, on the layer's device."""


def train_layer(
    model: LayerByLayer,
    module: nn.Module,
    streams: Streams,
    steps: Sequence[Sequence[int]],
    target: Target,
    config: ReconstructConfig,
    counter: Progress,
    seed: int,
    least_share: float = zeros.LEAST,
) -> dict[str, Tensor]:
    """Train `module`, the resident layer of `model` with float32 weights; returns them by name.

    Each of `steps` has the numbers of the batches whose gradients an optimizer step adds up. The
    layer runs under autocast; AdamW with warm-up and linear decay to zero, whose steps are in
    units of each weight's root mean square (Shazeer and Stern, 2018, arXiv:1804.04235), as the
    weights of some families are several times as large as those of others. Zeros stay zero in a
    weight whose share of them is `least_share` or more.
    """
    module.requires_grad_(True)
    zeros.hold(module, least_share)
    groups = _groups(module, config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, config.beta2), weight_decay=0.0, fused=True)
    count = len(steps) * config.passes
    warmup = max(1, round(config.warmup_ratio * count))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, (count - n) / max(1, count - warmup))
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(config.passes):
        for number in torch.randperm(len(steps), generator=order).tolist():
            optimizer.zero_grad(set_to_none=True)
            error, tokens = _add_gradients(model, streams, steps[number], target)
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            counter.advance(tokens, f"layer error {error:.4f}")
    module.requires_grad_(False)
    return {name: parameter.detach().cpu() for name, parameter in module.named_parameters()}


def _add_gradients(
    model: LayerByLayer, streams: Streams, numbers: Sequence[int], target: Target
) -> tuple[float, int]:
    """Add up the gradients of the mean over all tokens of these batches; returns mean and count."""
    tokens = [int(streams.batches[number]["real"].sum()) for number in numbers]
    parts = list[Tensor]()
    for number, own in zip(numbers, tokens, strict=True):
        part = batch_error(model, streams, number, target) * (own / sum(tokens))
        part.backward()
        parts.append(part.detach())
    return float(torch.stack(parts).sum()), sum(tokens)


@torch.no_grad()
def relative_error(
    model: LayerByLayer, streams: Streams, numbers: Iterable[int], target: Target
) -> float:
    """Mean over tokens of Σ c (ĥ⁺ − h⁺)² / Σ c h⁺² on the batches of these numbers."""
    errors = [(batch_error(model, streams, n, target), streams.batches[n]) for n in numbers]
    tokens = [int(batch["real"].sum()) for _, batch in errors]
    return sum(float(e) * n for (e, _), n in zip(errors, tokens, strict=True)) / sum(tokens)


def batch_error(model: LayerByLayer, streams: Streams, number: int, target: Target) -> Tensor:
    """The loss of one batch: the mean over its real tokens of Σ c (ĥ⁺ − h⁺)² / Σ c h⁺²."""
    batch = streams.batches[number]
    with torch.autocast(model.device.type, torch.bfloat16, model.dtype == torch.bfloat16):
        output_BTH = model.step(batch, streams.cut_input(number))
    real = batch["real"].to(output_BTH.device)
    goal_NH = widen(target.stream(number).to(output_BTH.device)[real])
    error_N = (widen(output_BTH[real]) - goal_NH).square() @ target.weight_H
    return (error_N / (goal_NH.square() @ target.weight_H).clamp_min(1e-6)).mean()


@torch.no_grad()
def channel_weights(streams: Streams, numbers: Iterable[int], stream: StreamOf) -> Tensor:
    """c [H] = 1 / (v + median v), with v the mean over tokens of h⁺² / |h⁺|² in each channel.

    Channels with far larger values than most (outlier features; Dettmers et al., 2022,
    arXiv:2208.07339) would otherwise be all that is trained: in Gemma 3 270M four of 640 have 85 to
    97 % of the squares, which the gains of the norms make small again.
    """
    totals, tokens = list[Tensor](), 0
    for number in numbers:
        goal_BTH = stream(number)
        square_NH = widen(goal_BTH[streams.batches[number]["real"].to(goal_BTH.device)]).square()
        # The floors keep a token, and channels, of zeros finite.
        share_NH = square_NH / square_NH.sum(-1, keepdim=True).clamp_min(1e-6)
        totals.append(share_NH.sum(0))
        tokens += len(square_NH)
    share_H = torch.stack(totals).sum(0) / tokens
    return 1 / (share_H + share_H.median()).clamp_min(1e-3 / len(share_H))


def _groups(module: nn.Module, config: ReconstructConfig) -> list[dict[str, object]]:
    """A group for each trained weight, with the rate times the weight's root mean square.

    All but the matrices of MLPs and experts have a share of that rate.
    """
    groups = list[dict[str, object]]()
    for name, weight in module.named_parameters():
        share = config.attention_rate if is_attention(name, weight) else 1.0
        if share == 0:
            weight.requires_grad_(False)
            continue
        size = max(float(weight.detach().square().mean().sqrt()), LEAST_SIZE)
        groups.append({"params": [weight], "lr": config.learning_rate * share * size})
    return groups
