"""Put a family's table together from what was found out on a tiny copy of its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regrow.families._derive.axes import Found, Layout, Shapes, axis_of
from regrow.families._derive.stock import UnsupportedError
from regrow.families._derive.tiny import CHOSEN, Tiny
from regrow.families._rows import LayerRule, Tensor
from regrow.families._table import Family

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Choice = Mapping[str, tuple[Layout | None, ...]]
"""The layout of each axis of each template in memory; None for a fixed axis."""


@dataclass
class Facts:
    """What is known of a model besides its axes; the defaults are what a plain decoder has."""

    memory: dict[str, tuple[str, ...]] = field(default_factory=dict)
    norms: frozenset[str] = frozenset()
    """Templates of the weights of RMSNorms that average over a dimension which may be cut."""
    norm_offset: float = 0.0
    eps: str = "rms_norm_eps"
    final_norm: str = "model.norm.weight"
    scaled_embedding: bool = False
    heads_divide_hidden: bool = False
    observe: dict[str, tuple[str, ...]] = field(default_factory=dict)
    residual: dict[str, str] = field(default_factory=dict)
    post_norm: dict[str, str] = field(default_factory=dict)
    residual_multiplier: float = 1.0
    mixes: str = ""


def assemble(
    config: dict[str, Any],
    shapes: Shapes,
    tiny: Tiny,
    kinds: Mapping[str, tuple[int, ...]],
    found: Found,
    choice: Choice,
    facts: Facts,
) -> Family:
    """The table of a model with this config; `shapes` are those of its templates in memory.

    `kinds` lists for each template the layers that have it.
    """
    sizes = {dim: config[key] for dim, key in found.keys.items()}
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        rule = rule_of(kinds[name], config, tiny) if name in kinds else None
        row = _row(name, shape, sizes, choice[name], found, name in facts.norms, rule)
        for template in facts.memory.get(name, (name,)):
            tensors[template] = _part(row, template, len(facts.memory.get(name, (name,))))
    tensors[HEAD] = Tensor(("vocab", "hidden"), when="!tie_word_embeddings")
    if EMBEDDING not in tensors:
        raise UnsupportedError(f"it has no {EMBEDDING}")
    return Family(
        model_type=config["model_type"],
        tensors=tensors,
        observe=facts.observe,
        residual=facts.residual,
        post_norm=facts.post_norm,
        defaults=_defaults(config, tiny, facts, found),
        norm_offset=facts.norm_offset,
        scaled_embedding=facts.scaled_embedding,
        config_keys=dict(found.keys),
        per_layer_config=dict(tiny.per_layer),
        heads_divide_hidden=facts.heads_divide_hidden,
        memory=dict(facts.memory),
        final_norm=facts.final_norm,
        eps=facts.eps,
        head_dim=_head_dim(tensors, shapes, sizes, found, config),
        writes_head_dim=found.writes_head_dim,
        residual_multiplier=facts.residual_multiplier,
        refused=dict(found.refused),
        mixes=facts.mixes,
        derived=True,
    )


def _defaults(config: dict[str, Any], tiny: Tiny, facts: Facts, found: Found) -> dict[str, Any]:
    """Values of the keys that a config.json may omit, as this config's class takes them."""
    keys = {*tiny.per_layer, *found.keys.values(), facts.eps, "head_dim", "num_key_value_heads"}
    defaults = {key: config.get(key) for key in keys}
    defaults["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", True))
    for key in CHOSEN:
        if isinstance(config.get(key), int):
            defaults["num_experts_per_tok"] = config[key]
    return defaults


def _row(
    name: str,
    shape: tuple[int, ...],
    sizes: dict[str, int],
    layouts: tuple[Layout | None, ...],
    found: Found,
    norm: bool,
    rule: LayerRule | None,
) -> Tensor:
    unit: dict[str, int] = {}
    for layout, length in zip(layouts, shape, strict=True):
        if layout is not None and not layout[1]:
            (dim,) = set(layout[0])
            unit[dim] = length // sizes[dim]
    axes = tuple(
        "head_dim" if (name, number) in found.per_head else axis_of(layout, length)
        for number, (layout, length) in enumerate(zip(layouts, shape, strict=True))
    )
    return Tensor(axes, norm=norm, layers=rule, unit=unit)


def _part(row: Tensor, template: str, count: int) -> Tensor:
    """The row on disk of one of `count` parts of a parameter, or of one expert's part."""
    axes = row.axes[1:] if "{expert}" in template else row.axes
    if count > 1:
        first = axes[0]
        if not isinstance(first, tuple) or len(first) != count:
            raise UnsupportedError(f"{template} is one of {count} parts of a fused parameter")
        axes = (first[0], *axes[1:])
    return Tensor(axes, norm=row.norm, layers=row.layers, unit=row.unit)


def _head_dim(
    tensors: Mapping[str, Tensor],
    shapes: Shapes,
    sizes: dict[str, int],
    found: Found,
    config: dict[str, Any],
) -> int | None:
    """Channels of one head in the reader of the heads, unless the config's head_dim is that."""
    if found.writes_head_dim:
        return None
    for name, row in tensors.items():
        if row.axes == ("hidden", "heads"):
            return shapes[name][1] // sizes["heads"]
    return config.get("head_dim") or sizes["hidden"] // sizes["heads"]


def rule_of(having: tuple[int, ...], config: dict[str, Any], tiny: Tiny) -> LayerRule | None:
    """The config key that says which layers have a tensor; None if all have it.

    If no key says it, the rule names the layers themselves, and layers cannot be cut.
    """
    count = int(config["num_hidden_layers"])
    if len(having) == count:
        return None
    for key, how in tiny.per_layer.items():
        value = config.get(key)
        if value is None:
            continue
        each = [
            value[n] if how == "each" else (n in value if how == "ids" else n < value)
            for n in range(count)
        ]
        inside, outside = ([v for n, v in enumerate(each) if (n in having) == w] for w in (1, 0))
        if not any(value in outside for value in inside):
            if any(isinstance(value, list | dict) for value in inside):
                continue
            return LayerRule(key, tuple(dict.fromkeys(inside)))
    return LayerRule("", having)
