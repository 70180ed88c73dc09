"""Prove a table on a tiny random model: units that are zero can be removed, and layers skipped.

For each dimension, a random model gets zeros in all rows of some units, and the model that is cut
to the other units must compute the same logits. For layers the full model skips a layer, for
experts the dropped ones are those that no token was sent to, and for tokens nothing is zeroed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrow.errors import reason_of
from regrow.families._cut import cut, cut_config
from regrow.families._derive.plans import plan_for, zeroed
from regrow.families._derive.stock import shapes, silent, stock
from regrow.families._table import Family
from regrow.plan import Plan

ROUNDING = 1e-4
"""The largest difference of logits, relative to the largest logit."""
NOISIEST = 1e-2
"""The largest difference where the model itself amplifies rounding; wrong cuts differ by 4e-2."""
LENGTH = 12


class NotProvenError(Exception):
    """A cut changed what the model computes; the text says how."""


@dataclass
class Subject:
    """A tiny random model: its config, its tensors by name on disk, and its token ids [B, T]."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    ids: Tensor

    @property
    def kind(self) -> Any:
        """The stock class of the model."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        return MODEL_FOR_CAUSAL_LM_MAPPING[type(stock(self.config))]

    def model(self, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        """The stock model with these tensors, which are named as on disk."""
        with silent():
            return self.kind.from_pretrained(
                None,
                config=stock(config),
                state_dict={name: tensor.clone() for name, tensor in tensors.items()},
                dtype=torch.float32,
                experts_implementation="eager",
            ).eval()


@torch.no_grad()
def randomize(model: Any, seed: int = 0) -> None:
    """Random values for every stored tensor: matrices by their width, vectors near their value."""
    draw = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.data_ptr() in done:
            continue
        done.add(tensor.data_ptr())
        values = torch.randn(tensor.shape, generator=draw)
        if tensor.dim() < 2:
            tensor.add_(0.3 * values.to(tensor.dtype))
        else:
            width = 1.0 if "embed_tokens" in name else tensor.shape[-1] ** -0.5
            tensor.copy_(values * width)


@torch.no_grad()
def logits(model: Any, ids: Tensor, **given: Any) -> Tensor:
    """Logits [B, T, V] in float64."""
    found: Tensor = model(ids, use_cache=False, **given).logits
    return found.double()


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if one.shape != other.shape:
        return float("inf")
    found = float((one - other).abs().max() / other.abs().max().clamp_min(1e-9))
    return found if found == found else float("inf")


@torch.no_grad()
def prove(family: Family, subject: Subject, dim: str) -> None:
    """Prove that one dimension can be cut; raises NotProvenError with what went wrong."""
    if family.sizes(subject.config)[dim] < 2:
        raise NotProvenError("the model has only one")
    if dim == "layers":
        _prove_layers(family, subject)
    elif dim == "experts":
        _prove_experts(family, subject)
    else:
        _prove_width(family, subject, dim)


def after_of(family: Family, config: dict[str, Any], dim: str) -> dict[str, Any]:
    """The sizes for the proof of one dimension: three quarters, or two thirds, of its units."""
    sizes = family.sizes(config)
    size = sizes[dim]
    if dim == "heads":
        return {dim: sizes["kv_heads"] * (size // sizes["kv_heads"] - 1)}
    if dim == "kv_heads":
        return {dim: size // 2}
    keep = size * 3 // 4
    return {dim: keep - keep % 8 if keep > 8 else max(1, keep)}


def _prove_width(family: Family, subject: Subject, dim: str) -> None:
    after = after_of(family, subject.config, dim)
    plan = plan_for(family, subject.config, after)
    new = cut_config_of(family, subject, plan)
    parent_tensors = zeroed(family, subject.tensors, plan)
    parent = subject.model(subject.config, parent_tensors)
    student = student_of(family, subject, parent_tensors, plan, new)
    if dim == "vocab":
        ids = torch.tensor(plan.vocab)[subject.ids % len(plan.vocab or ())]
        place = {old: n for n, old in enumerate(plan.vocab or ())}
        small = torch.tensor([[place[int(i)] for i in row] for row in ids])
        found, wanted = logits(student, small), logits(parent, ids)[..., plan.vocab]
    else:
        found, wanted = logits(student, subject.ids), logits(parent, subject.ids)
        whole = logits(subject.model(subject.config, subject.tensors), subject.ids)
        if distance(whole, wanted) < 10 * ROUNDING:
            raise NotProvenError("zeroed units change nothing, so a cut proves nothing")
    if distance(found, wanted) > ROUNDING:
        exact = logits(parent, subject.ids)
        if distance(found, wanted) > _rounding(subject, parent_tensors, exact):
            _compare(found, wanted)


def _rounding(subject: Subject, tensors: Mapping[str, Tensor], exact: Tensor) -> float:
    """Ten times what a change of every weight by a millionth changes, at most NOISIEST.

    Some mixers (gated delta rule) amplify the rounding of float32 beyond ROUNDING.
    """
    draw = torch.Generator().manual_seed(2)
    near = {
        name: tensor * (1 + 1e-6 * torch.randn(tensor.shape, generator=draw))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }
    changed = logits(subject.model(subject.config, near), subject.ids)
    return min(NOISIEST, 10 * distance(changed, exact))


def _compare(found: Tensor, wanted: Tensor) -> None:
    difference = distance(found, wanted)
    if difference > ROUNDING:
        raise NotProvenError(
            f"a copy without the zeroed units computes something else (relative difference "
            f"{difference:.1g})"
        )


def cut_config_of(family: Family, subject: Subject, plan: Plan) -> dict[str, Any]:
    try:
        new = cut_config(subject.config, plan, family)
        stock(new)
        return new
    except Exception as error:  # whatever a config class raises
        raise NotProvenError(f"its config class refuses the cut: {reason_of(error)}") from None


def student_of(
    family: Family,
    subject: Subject,
    tensors: Mapping[str, Tensor],
    plan: Plan,
    new: dict[str, Any],
) -> Any:
    kept = dict(cut(tensors.items(), plan, family, subject.config))
    for name, shape in shapes(new).items():
        if name in kept and tuple(kept[name].shape) != shape:
            raise NotProvenError(
                f"the cut {name} has shape {tuple(kept[name].shape)}, but the class makes {shape}"
            )
    try:
        return subject.model(new, kept)
    except Exception as error:  # whatever a model class raises
        raise NotProvenError(f"its class cannot build the cut model: {reason_of(error)}") from None


def _prove_layers(family: Family, subject: Subject) -> None:
    count = family.sizes(subject.config)["layers"]
    for dropped in range(count):
        kept = [n for n in range(count) if n != dropped]
        plan = plan_for(family, subject.config, {"layers": kept})
        student = student_of(
            family, subject, subject.tensors, plan, cut_config_of(family, subject, plan)
        )
        parent = subject.model(subject.config, subject.tensors)
        parent.base_model.layers[dropped].register_forward_hook(_skip, with_kwargs=True)
        _compare(logits(student, subject.ids), logits(parent, subject.ids))


def _skip(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *out[1:]) if isinstance(out, tuple) else given


def _prove_experts(family: Family, subject: Subject) -> None:
    """Prove that experts without tokens can go; a router may be sharpened, which it cannot notice.

    A softmax over all experts gives a share to those that are not chosen; with large router
    weights that share is nothing.
    """
    error: Exception = NotProvenError("its routing was not seen")
    for scale in (1.0, 1000.0):
        tensors = {n: t * scale if _routes(family, n) else t for n, t in subject.tensors.items()}
        sharp = Subject(subject.config, tensors, subject.ids[:1, :3])
        try:
            after = {"experts": _chosen_experts(family, sharp)}
            plan = plan_for(family, sharp.config, after)
            parent = sharp.model(sharp.config, tensors)
            student = student_of(family, sharp, tensors, plan, cut_config_of(family, sharp, plan))
            _compare(logits(student, sharp.ids), logits(parent, sharp.ids))
            return
        except NotProvenError as failed:
            error = failed
    raise error


def _routes(family: Family, name: str) -> bool:
    place = family.find(name)
    return place is not None and family.tensors[place.template].axes == ("experts", "hidden")


def _chosen_experts(family: Family, subject: Subject) -> dict[int, list[int]]:
    """For each layer with experts those that a token was sent to, filled up to equal numbers."""
    model = subject.model(subject.config, subject.tensors)
    count = family.sizes(subject.config)["experts"]
    seen: dict[int, set[int]] = {}
    handles = []
    for layer in family.layers_of("experts", subject.config):

        def see(module: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 2:
                    seen.setdefault(layer, set()).update(value.flatten().tolist())

        for name, module in model.base_model.layers[layer].named_modules():
            if name.endswith("experts"):
                handles.append(module.register_forward_pre_hook(see, with_kwargs=True))
    logits(model, subject.ids)
    if not seen:
        raise NotProvenError("its routing was not seen")
    most = max(map(len, seen.values()))
    if most >= count:
        raise NotProvenError("every expert received a token of a short text")
    rest = {n: [e for e in range(count) if e not in ids] for n, ids in seen.items()}
    return {n: sorted([*ids, *rest[n][: most - len(ids)]]) for n, ids in seen.items()}
