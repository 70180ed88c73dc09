"""Train the resident layer of a model so that its output comes near a given stream.

Shapes: B sequences, T tokens, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

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

Target = Callable[[int], Tensor]
"""The stream [B, T, H] that the layer's output should have on a batch, by its number."""


def train_layer(
    model: LayerByLayer,
    module: nn.Module,
    streams: Streams,
    batches: int,
    target: Target,
    config: ReconstructConfig,
    counter: Progress,
    seed: int,
    least_share: float = zeros.LEAST,
) -> dict[str, Tensor]:
    """Train `module`, the resident layer of `model`, on the first `batches` of the streams.

    Float32 weights under autocast; AdamW with warm-up and linear decay to zero. The module is left
    with the new weights in its own dtype, and these are returned by name. Zeros stay zero in a
    weight whose share of them is `least_share` or more.
    """
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    _convert(module, dict.fromkeys(dtypes, torch.float32), trained=True)
    zeros.hold(module, least_share)
    groups = _groups(module, config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, config.beta2), weight_decay=0.0)
    steps = batches * config.passes
    warmup = max(1, round(config.warmup_ratio * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, (steps - n) / max(1, steps - warmup))
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(config.passes):
        for number in torch.randperm(batches, generator=order).tolist():
            loss = batch_error(model, streams, number, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            note = f"layer error {loss.item():.4f}"
            counter.advance(int(streams.batches[number]["real"].sum()), note)
    _convert(module, dtypes, trained=False)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@torch.no_grad()
def relative_error(
    model: LayerByLayer, streams: Streams, numbers: Iterable[int], target: Target
) -> float:
    """Mean over tokens of |ĥ⁺ − h⁺|² / |h⁺|² on the batches of these numbers."""
    errors = [(batch_error(model, streams, n, target), streams.batches[n]) for n in numbers]
    tokens = [int(batch["real"].sum()) for _, batch in errors]
    return sum(float(e) * n for (e, _), n in zip(errors, tokens, strict=True)) / sum(tokens)


def batch_error(model: LayerByLayer, streams: Streams, number: int, target: Target) -> Tensor:
    """The loss of one batch: the mean over its real tokens of |ĥ⁺ − h⁺|² / |h⁺|²."""
    batch = streams.batches[number]
    with torch.autocast(model.device.type, torch.bfloat16, model.dtype == torch.bfloat16):
        output_BTH = model.step(batch, streams.cut_input(number))
    real = batch["real"].to(output_BTH.device)
    goal_NH = widen(target(number).to(output_BTH.device)[real])
    error_N = (widen(output_BTH[real]) - goal_NH).square().sum(-1)
    return (error_N / goal_NH.square().sum(-1).clamp_min(1e-6)).mean()


def _convert(module: nn.Module, dtypes: dict[str, torch.dtype], trained: bool) -> None:
    """Replace the module's parameters by ones of these dtypes, trained or frozen."""
    for name, parameter in list(module.named_parameters()):
        path, _, leaf = name.rpartition(".")
        value = nn.Parameter(parameter.detach().to(dtypes[name]), requires_grad=trained)
        setattr(module.get_submodule(path), leaf, value)


def _groups(module: nn.Module, config: ReconstructConfig) -> list[dict[str, object]]:
    """Parameter groups: the matrices of MLPs and experts, and all else at a share of their rate."""
    fast, slow = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in module.named_parameters():
        (slow if is_attention(name, parameter) else fast).append(parameter)
    rates = [(fast, 1.0), (slow, config.attention_rate)]
    for parameter in slow if config.attention_rate == 0 else ():
        parameter.requires_grad_(False)
    return [
        {"params": parameters, "lr": config.learning_rate * rate}
        for parameters, rate in rates
        if parameters and rate > 0
    ]
