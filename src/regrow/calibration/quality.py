"""Measures what a change of the weights costs: perplexity of both models, and KL between them."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.stage_dir import Figure
from regrow.training.head import head_of
from regrow.training.model_check import check_model
from regrow.training.teacher import mean_loss, reference_states, scored

Batches = list[dict[str, Tensor]]


@torch.no_grad()
def quality(
    before: Checkpoint, after: Checkpoint, batches: Batches, device: torch.device, kl: str
) -> list[Figure]:
    """Perplexity of both models and the KL between them; transformers opens one after the other.

    `kl` says which models are compared. The logits are computed in float32: logits rounded to
    bfloat16 would add about 1e-4 to a KL that is often smaller.
    """
    dtype = before.compute_dtype(device)
    model = before.model(dtype, device)
    check_model(model)
    reference = reference_states(model, batches)
    head = head_of(model)
    head = replace(head, weight_VH=head.weight_VH.detach())
    old = mean_loss(model, batches, reference, head, "cross_entropy", exact=True)
    del model
    gc.collect()
    model = after.model(dtype, device)
    new = mean_loss(model, batches, reference, head, "cross_entropy", exact=True)
    distance = mean_loss(model, batches, reference, head, "forward_kl", exact=True)
    tokens = sum(int(scored(batch).sum()) for batch in batches)
    computed = f"{dtype}, exact logits".replace("torch.", "")
    how = f"calibration sequences that were not calibrated on, {computed}"
    return [
        Figure(name="perplexity before", value=math.exp(old), n=tokens, convention=how),
        Figure(name="perplexity", value=math.exp(new), n=tokens, convention=how),
        Figure(name="× perplexity", value=math.exp(new - old), n=tokens, convention=how),
        Figure(
            name="kl",
            value=distance,
            unit="nats",
            n=tokens,
            convention=f"{kl} per scored token; {how}",
        ),
    ]


def report(title: str, folder: Path, figures: list[dict[str, object]]) -> str:
    """The figures of a folder, one line each, below `title`."""
    width = max(len(str(figure["name"])) for figure in figures)
    lines = [f"{title}: {folder}"]
    for figure in figures:
        value = figure["value"]
        assert isinstance(value, float)
        shown = f"{value:,.0f}" if figure.get("unit") == "bytes" else f"{value:,.4f}"
        lines.append(f"  {figure['name']:<{width}}  {shown:>15} {figure.get('unit', '')}".rstrip())
    return "\n".join(lines)
