"""A tiny copy of a config: the same class, flags and kinds of layers, with small sizes.

Everything that is found out about a model is found out on such copies, so no weights are read and
a config of 70 billion parameters costs as much as a small one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from regrow.errors import reason_of
from regrow.families._derive.stock import (
    UnsupportedError,
    build,
    explicit,
    shapes,
    silent,
)
from regrow.families._table import PER_LAYER

HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "moe_topk")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    HEADS: 4,
    KV_HEADS: 2,
    "head_dim": 16,
    "vocab_size": 128,
    **dict.fromkeys(EXPERTS, 8),
    "moe_intermediate_size": 40,
    "n_group": 2,
    "topk_group": 1,
    "sliding_window": 5,
    "index_topk": 4,
}
"""Sizes of a tiny copy; a smaller size of the real config is kept."""
LEFT_TOGETHER = ("head_dim", "hidden_size", HEADS, KV_HEADS, "intermediate_size")
"""Sizes that may only fit each other, so that two of them are left as they are."""
MOST_LAYERS = 8
MOST_PARAMETERS = 60_000_000
COUNTS = re.compile(r"first_k_dense|num_dense_layers|dense_layers|layer_start_index|num_first")
IDS = re.compile(r"(layers|idxs?|indices|layer_ids)$")
How = Literal["each", "ids", "count"]


@dataclass(frozen=True)
class Tiny:
    """A tiny copy of a config, and how its layers relate to those of the original."""

    config: dict[str, Any]
    layers: tuple[int, ...]
    """The layers of the original that the copy has."""
    per_layer: dict[str, How]
    """Config keys that a cut of layers changes."""
    kinds: dict[str, tuple[int, ...]]
    """For each tensor inside layers, by template, the layers of the original that have it."""


def template_of(name: str) -> tuple[str, int | None]:
    """A tensor's name with {layer} for the layer's number, and that number."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    if match is None:
        return name, None
    return name.replace(match[0], ".layers.{layer}.", 1), int(match[1])


def shrink(config: dict[str, Any]) -> Tiny:
    """The tiny copy of a config; raises UnsupportedError when none can be built."""
    full = explicit(config)
    if not isinstance(full.get("num_hidden_layers"), int):
        raise UnsupportedError("its config has no num_hidden_layers")
    if not isinstance(full.get(HEADS), int):
        raise UnsupportedError(f"its config has no {HEADS}: it is no model of attention layers")
    per_layer = _per_layer(full)
    small = _small(full)
    first, error = None, ""
    for left in _left_alone(small):
        trial = {**full, **{key: value for key, value in small.items() if key not in left}}
        first, error = _picked(trial, per_layer)
        if first is not None:
            return first
    raise UnsupportedError(f"no tiny copy of its config can be built: {error}")


def _left_alone(small: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Sets of sizes that are not made small, the smallest sets first."""
    keys = [key for key in ("head_dim", KV_HEADS, *SMALL) if key in small]
    keys = list(dict.fromkeys(keys))
    yield ()
    yield from ((key,) for key in keys)
    yield from combinations([key for key in keys if key in LEFT_TOGETHER], 2)


def _small(full: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {
        key: value
        for key, value in SMALL.items()
        if isinstance(full.get(key), int) and full[key] > value
    }
    if full.get(KV_HEADS) == 1:
        small.pop(KV_HEADS, None)
    for key in CHOSEN:
        if isinstance(full.get(key), int) and full[key] > 2:
            small[key] = 2
    for key, value in full.items():
        if key.endswith("_token_id"):
            small[key] = None if key == "pad_token_id" or value is None else 1
    small["pad_token_id"] = None
    small |= _epsilons(full)
    if isinstance(full.get("vocab_size_per_layer_input"), int):
        small["vocab_size_per_layer_input"] = small.get("vocab_size", full.get("vocab_size"))
    return small


def _epsilons(full: dict[str, Any]) -> dict[str, float]:
    """A small epsilon of its own for each key, so that a norm's can be told by its value."""
    keys = [k for k, v in sorted(full.items()) if k.endswith(("eps", "epsilon")) and v]
    return {key: 1e-14 * (n + 1) for n, key in enumerate(keys) if isinstance(full[key], float)}


def _per_layer(full: dict[str, Any]) -> dict[str, How]:
    """Keys with an entry for each layer, lists of layer ids, and numbers of first layers."""
    count = full["num_hidden_layers"]
    found: dict[str, How] = {}
    for key, value in full.items():
        if isinstance(value, list) and len(value) == count and count > 1:
            found[key] = "each"
        elif isinstance(value, list) and IDS.search(key) and _are_ids(value, count):
            found[key] = "ids"
        elif isinstance(value, int) and not isinstance(value, bool) and COUNTS.search(key):
            found[key] = "count"
    known = {key: how for key, how in PER_LAYER.items() if key in full and key not in found}
    return {**known, **found}


def _are_ids(value: list[Any], count: int) -> bool:
    return bool(value) and all(isinstance(n, int) and 0 <= n < count for n in value)


def with_layers(
    config: dict[str, Any], per_layer: dict[str, How], layers: list[int]
) -> dict[str, Any]:
    """The config of a model that has only these layers of the model of `config`."""
    new = {**config, "num_hidden_layers": len(layers)}
    for key, how in per_layer.items():
        value = config.get(key)
        if value is None:
            continue
        if how == "each":
            new[key] = [value[n] for n in layers]
        elif how == "ids":
            new[key] = [layers.index(n) for n in value if n in layers]
        else:
            new[key] = sum(n < value for n in layers)
    return new


def _picked(full: dict[str, Any], per_layer: dict[str, How]) -> tuple[Tiny | None, str]:
    """The copy with a few layers of each kind, if it runs; otherwise None and the error."""
    try:
        found = shapes(full)
        having, forms = _having(found)
        _refuse_varying(forms)
        kinds = _signatures(found, full, per_layer)
        layers = _some_of_each(kinds)
        small = with_layers(full, per_layer, layers)
        if problem := _run(small):
            return None, problem
    except UnsupportedError:
        raise
    except Exception as error:  # whatever a model's own code raises for sizes that do not fit
        return None, reason_of(error)
    return Tiny(small, tuple(layers), per_layer, having), ""


def _refuse_varying(forms: dict[str, set[tuple[int, ...]]]) -> None:
    """Refuse a tensor whose shape depends on the layer, as with heads of two widths (Gemma 4)."""
    for template, each in forms.items():
        if len(each) > 1:
            few = " and ".join(map(str, sorted(each)[:2]))
            raise UnsupportedError(
                f"{template} has other shapes in some layers (in a small copy {few}), and a table "
                "has one for all"
            )


def _having(
    found: dict[str, tuple[int, ...]],
) -> tuple[dict[str, tuple[int, ...]], dict[str, set[tuple[int, ...]]]]:
    having: dict[str, list[int]] = {}
    forms: dict[str, set[tuple[int, ...]]] = {}
    for name, shape in found.items():
        template, layer = template_of(name)
        forms.setdefault(template, set()).add(shape)
        if layer is not None:
            having.setdefault(template, []).append(layer)
    return {template: tuple(sorted(layers)) for template, layers in having.items()}, forms


def _signatures(
    found: dict[str, tuple[int, ...]], full: dict[str, Any], per_layer: dict[str, How]
) -> list[Any]:
    """For each layer what makes its kind: its tensors, and the config's entries for it."""
    kinds: list[set[Any]] = [set() for _ in range(full["num_hidden_layers"])]
    for name, shape in found.items():
        template, layer = template_of(name)
        if layer is not None and layer < len(kinds):
            kinds[layer].add((template, shape))
    if not any(kinds):
        raise UnsupportedError("its layers are not in a list named layers")
    for key, how in per_layer.items():
        if how == "each" and full.get(key) is not None:
            for layer, value in enumerate(full[key]):
                kinds[layer].add((key, str(value)))
    return [frozenset(kind) for kind in kinds]


def _some_of_each(kinds: list[Any]) -> list[int]:
    """Two layers of each kind, and at least three layers in all, in their order."""
    chosen: list[int] = []
    for kind in dict.fromkeys(kinds):
        chosen += [n for n, other in enumerate(kinds) if other == kind][:2]
    chosen = sorted(chosen[:MOST_LAYERS])
    others = [n for n in range(len(kinds)) if n not in chosen]
    return sorted(chosen + others[: max(0, 3 - len(chosen))])


def _run(config: dict[str, Any]) -> str:
    """Run the copy once, as its own code checks sizes too; returns why it cannot be used, or ''."""
    import torch

    count = sum(tensor.numel() for tensor in build(config).state_dict().values())
    if count > MOST_PARAMETERS:
        return f"the smallest copy has {count:,} parameters"
    with torch.no_grad(), silent():
        build(config, "cpu")(torch.arange(2, 14).repeat(2, 1), use_cache=False)
    return ""
