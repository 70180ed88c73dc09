"""What the modules of a tiny model do: where to measure, and where the residual stream is read.

One forward pass of random text runs with hooks, and the tensors that modules receive and return
are compared. B sequences, T tokens, H hidden channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.families._derive.axes import Found
from regrow.families._derive.tiny import template_of
from regrow.families._table import Family

LAYER = "model.layers.{layer}"
CLOSE = 1e-4


@dataclass
class Step:
    """One call of a module: its template and layer, what it received and what it returned."""

    name: str
    template: str
    layer: int | None
    module: nn.Module
    given: Tensor | None
    made: Tensor | None


@torch.no_grad()
def trace(model: Any, ids: Tensor, **inputs: Tensor) -> list[Step]:
    """The calls of all modules in one forward pass, in the order in which they end."""
    steps: list[Step] = []

    def watch(name: str) -> Any:
        template, layer = template_of(f"{name}.")

        def see(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given = [x for x in (*args, *kwargs.values()) if _is_state(x)]
            outs = [x for x in (out if isinstance(out, tuple) else (out,)) if _is_state(x)]
            step = Step(
                name, template[:-1], layer, module, *(x[0] if x else None for x in (given, outs))
            )
            steps.append(step)

        return see

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        model(ids, use_cache=False, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return steps


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same values in memory, in any shape."""
    if one is None or other is None:
        return False
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


@torch.no_grad()
def scales_embedding(model: Any, ids: Tensor, hidden: int) -> bool:
    """Whether the model multiplies its embedding by sqrt(hidden_size)."""
    first = next(step for step in trace(model, ids) if step.template == LAYER)
    plain = model.get_input_embeddings().weight[ids]
    assert first.given is not None
    ratio = first.given.norm() / plain.norm()
    return abs(float(ratio) / hidden**0.5 - 1) < 1e-2


@torch.no_grad()
def measured(model: Any, family: Family, found: Found, ids: Tensor) -> dict[str, Any]:
    """The fields observe, residual, post_norm and residual_multiplier of a family's table.

    Where the outputs of attention or MLP are not added to the stream as repair assumes, `refused`
    says so under `repair`.
    """
    steps = trace(model, ids)
    observe: dict[str, tuple[str, ...]] = {}
    for dim in ("mlp", "heads"):
        readers = [name.removesuffix(".weight") for name in family.readers(dim)]
        if len(readers) == 1 and _is_linear(steps, readers[0]):
            observe[dim] = (readers[0],)
        elif any(row.has(dim) for row in family.tensors.values()):
            names = ", ".join(readers) or "no projection"
            found.refused.setdefault(dim, f"read by {names}: where to measure is not clear")
    if module := _experts(steps, found):
        observe["experts"] = (module,)
    observe["hidden"] = _before_readers(steps, family)
    fields: dict[str, Any] = {"observe": observe, "residual": {}, "post_norm": {}}
    reason = _stream(steps, model, family, ids, fields)
    if reason:
        found.refused["repair"] = reason
    return fields


def _is_linear(steps: list[Step], template: str) -> bool:
    modules = [step.module for step in steps if step.template == template]
    return bool(modules) and all(isinstance(module, nn.Linear) for module in modules)


def _before_readers(steps: list[Step], family: Family) -> tuple[str, ...]:
    """The modules whose output projections read: norms, or the layers where there are none."""
    on_disk = set(family.readers("hidden"))
    named = [name for name, parts in family.memory.items() if on_disk & set(parts)]
    readers = {name.removesuffix(".weight") for name in (*on_disk, *named)}
    found: dict[str, None] = {}
    for step in steps:
        if step.template in readers and step.template != family.head.removesuffix(".weight"):
            makers = [s.template for s in steps if same(s.made, step.given) and s is not step]
            found[makers[0] if makers else LAYER] = None
    found[family.final_norm.removesuffix(".weight")] = None
    return tuple(found)


def _experts(steps: list[Step], found: Found) -> str | None:
    """The module that receives tokens, chosen experts and weights, if it is of the usual kind."""
    for step in steps:
        module = step.module
        if step.template.endswith(".experts") and "experts" in found.keys:
            up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
            if not (isinstance(up, Tensor) and isinstance(down, Tensor) and up.dim() == 3):
                return None
            if hasattr(module, "act_fn") and up.shape[1] == 2 * down.shape[2]:
                return step.template if _usual_experts(module, up, down) else None
    return None


def _usual_experts(module: Any, up: Tensor, down: Tensor) -> bool:
    """Whether an expert's output is its weight · down(act(gate(h)) · up(h))."""
    h = torch.randn(3, up.shape[2], generator=torch.Generator().manual_seed(4))
    chosen, weight = torch.tensor([[0], [1], [0]]), torch.tensor([[0.5], [0.25], [0.75]])
    try:
        out = module(h, chosen, weight)
    except (TypeError, ValueError, RuntimeError, IndexError):  # experts with other inputs
        return False
    for row, expert in enumerate((0, 1, 0)):
        gate, wide = (up[expert] @ h[row]).chunk(2)
        want = weight[row] * (down[expert] @ (module.act_fn(gate) * wide))
        if not torch.allclose(out[row], want, rtol=CLOSE, atol=CLOSE):
            return False
    return True


def _stream(
    steps: list[Step], model: Any, family: Family, ids: Tensor, fields: dict[str, Any]
) -> str:
    """Fill in residual, post_norm and the multiplier; returns why repair is not possible, or ''."""
    factors: list[float] = []
    layers = [step for step in steps if step.template == LAYER]
    for whole in layers:
        inside = [step for step in steps if step.layer == whole.layer and step is not whole]
        middle = _middle(inside, whole, family)
        if middle is None or whole.given is None or whole.made is None:
            return "the stream between attention and MLP was not found"
        residual = {"heads": _reader_of(inside, whole.given), "mlp": middle.template}
        if fields["residual"] not in ({}, residual):
            return "layers read the stream in different places"
        fields["residual"] = residual
        ends = {"heads": (whole.given, middle.given), "mlp": (middle.given, whole.made)}
        for dim, (before, after) in ends.items():
            part = next(
                (s for t in family.readers(dim) for s in inside if t == f"{s.template}.weight"),
                None,
            )
            if part is None or part.made is None:
                continue
            norm = next(
                (s for s in inside if same(s.given, part.made) and _hidden_norm(s, family)), None
            )
            if norm is not None:
                fields["post_norm"][dim] = norm.template
            added = (part if norm is None else norm).made
            if before is None or after is None or added is None:
                continue
            factor = _ratio(after.reshape(before.shape) - before, added.reshape(before.shape))
            if factor is None:
                return f"the output of {part.template} is not what is added to the stream"
            factors.append(factor)
    if factors and max(factors) - min(factors) > 1e-3:
        return "attention and MLP are added to the stream with different factors"
    if factors and abs(factors[0] - 1) > 1e-3:
        fields["residual_multiplier"] = round(factors[0], 6)
    return ""


def _hidden_norm(step: Step, family: Family) -> bool:
    row = family.tensors.get(f"{step.template}.weight")
    return row is not None and row.norm and row.axes == ("hidden",)


def _reader_of(inside: list[Step], stream: Tensor) -> str:
    """The first module of a layer that reads the stream, if it has one input; else the layer."""
    for step in inside:
        if same(step.given, stream) and step.template.endswith("norm"):
            return step.template
    return LAYER


def _middle(inside: list[Step], whole: Step, family: Family) -> Step | None:
    """The module that reads the stream between attention and MLP.

    It is the last module of the layer whose input is no other module's output, has the stream's
    shape and is not the layer's own input: its input is a sum.
    """
    stream = whole.given
    assert stream is not None
    readers = family.readers("hidden")
    for step in inside:
        if step.given is None or step.given.numel() != stream.numel():
            continue
        if step.given.shape[-1] != stream.shape[-1]:  # a norm over single heads
            continue
        if not step.template.endswith("norm") and not any(
            reader.startswith(f"{step.template}.") for reader in readers
        ):
            continue
        made = any(same(other.made, step.given) for other in inside if other is not step)
        if not made and not same(step.given, stream):
            depth = [s for s in inside if same(s.given, step.given)]
            return depth[0] if depth[0].template.endswith("norm") else depth[-1]
    return None


def _ratio(change: Tensor, added: Tensor) -> float | None:
    """The factor f with change = f · added; None if there is none."""
    factor = float((change * added).sum() / added.square().sum().clamp_min(1e-12))
    rest = (change - factor * added).norm() / change.norm().clamp_min(1e-12)
    return factor if float(rest) < 1e-3 else None
