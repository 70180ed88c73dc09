"""Measures a quantized model: its bytes, its perplexity and its KL to the unquantized model."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.families import Family
from regrow.plan import stored_plans
from regrow.quantization.formats import Scheme
from regrow.stage_dir import Figure
from regrow.stages.quantize.choose import WEIGHT
from regrow.training.head import head_of
from regrow.training.model_check import check_model
from regrow.training.teacher import mean_loss, reference_states, scored

Batches = list[dict[str, Tensor]]


def sizes(
    before: Checkpoint, after: Checkpoint, family: Family, chosen: dict[str, Scheme]
) -> list[Figure]:
    """Bytes, bits per weight, and ratios to the model before quantization and before pruning."""
    old, new = (sum(map(c.bytes, c.names())) for c in (before, after))
    shapes = [(before.shapes[module + WEIGHT], scheme) for module, scheme in chosen.items()]
    weights = sum(rows * columns for (rows, columns), _ in shapes)
    bits = 8 * sum(scheme.type.bytes(*shape) for shape, scheme in shapes)
    parameters = family.count(before.config)
    figures = [
        Figure(name="bytes before", value=old, unit="bytes"),
        Figure(name="bytes", value=new, unit="bytes"),
        Figure(name="bits per quantized weight", value=bits / weights, unit="bits", n=weights),
        Figure(name="bits per parameter", value=8 * new / parameters, unit="bits", n=parameters),
        Figure(name="times smaller", value=old / new),
    ]
    ancestor = _ancestor_parameters(before, family)
    if ancestor is not None:
        convention = f"{ancestor:,} parameters in 16 bits, before pruning, ÷ bytes"
        ratio = 2 * ancestor / new
        name = "times smaller than the first"
        figures.append(Figure(name=name, value=ratio, convention=convention))
    return figures


def _ancestor_parameters(checkpoint: Checkpoint, family: Family) -> int | None:
    """Parameters of the model before its first pruning, read from the plan in its folder."""
    first = next(stored_plans(checkpoint.folder), None)
    return None if first is None else family.count(checkpoint.config, first.before)


@torch.no_grad()
def quality(
    before: Checkpoint, after: Checkpoint, batches: Batches, device: torch.device
) -> list[Figure]:
    """Perplexity of both models and the KL between them; transformers opens one after the other.

    The logits are computed in float32: logits rounded to bfloat16 would add about 1e-4 to a KL that
    is often smaller.
    """
    dtype = before.compute_dtype()
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
    kl = mean_loss(model, batches, reference, head, "forward_kl", exact=True)
    tokens = sum(int(scored(batch).sum()) for batch in batches)
    computed = f"{dtype}, exact logits".replace("torch.", "")
    convention = f"calibration sequences that were not calibrated on, {computed}"
    return [
        Figure(name="perplexity before", value=math.exp(old), n=tokens, convention=convention),
        Figure(name="perplexity", value=math.exp(new), n=tokens, convention=convention),
        Figure(name="× perplexity", value=math.exp(new - old), n=tokens, convention=convention),
        Figure(
            name="kl",
            value=kl,
            unit="nats",
            n=tokens,
            convention=f"KL(unquantized || quantized) per scored token; {convention}",
        ),
    ]


def report(folder: Path, figures: list[dict[str, object]]) -> str:
    """The figures of a quantized folder, one line each."""
    width = max(len(str(figure["name"])) for figure in figures)
    lines = [f"quantized: {folder}"]
    for figure in figures:
        value = figure["value"]
        assert isinstance(value, float)
        shown = f"{value:,.0f}" if figure.get("unit") == "bytes" else f"{value:,.4f}"
        lines.append(f"  {figure['name']:<{width}}  {shown:>15} {figure.get('unit', '')}".rstrip())
    return "\n".join(lines)
