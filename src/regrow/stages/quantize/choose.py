"""Which module gets which scheme, from a config's rules and the shapes of a checkpoint."""

from __future__ import annotations

import re
from collections import Counter

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.families import Family
from regrow.quantization import formats
from regrow.quantization.formats import Scheme
from regrow.stages.quantize import QuantizeConfig

WEIGHT = ".weight"


def choose(checkpoint: Checkpoint, family: Family, config: QuantizeConfig) -> dict[str, Scheme]:
    """Scheme by module, of those that are quantized, in the order of the checkpoint.

    Raises UserError for a pattern that matches nothing, for an embedding to be quantized, and when
    nothing is left to quantize.
    """
    modules = [n.removesuffix(WEIGHT) for n, s in checkpoint.shapes.items() if len(s) == 2]
    embedding, head = (name.removesuffix(WEIGHT) for name in (family.embedding, family.head))
    _check_patterns(config, [*modules, head])
    found = {}
    for module in modules:
        if _first(config.keep, module) or is_router(family, module + WEIGHT):
            continue
        rule = _first(tuple(config.rules), module)
        scheme = formats.find_scheme(config.rules[rule] if rule else config.scheme)
        if module == embedding:
            raise UserError(f"{module}: no reader takes a quantized embedding; put it into keep")
        if module == head and scheme.dynamic:
            raise UserError(
                f"{module}: {scheme.name} quantizes inputs too, which the head's must not be; put "
                "it into keep, or give it a rule with int8 or int4"
            )
        found[module] = scheme.fitting(checkpoint.shapes[module + WEIGHT][1])
    if not found:
        raise UserError(f"nothing is left to quantize: keep {list(config.keep)} matches all")
    _same_for_experts(found, checkpoint, family)
    if not config.dequantize:
        _check_readers(found, checkpoint, family)
    return found


def is_router(family: Family, name: str) -> bool:
    """Whether a tensor chooses among experts: it is small, and an error there goes far."""
    place = family.find(name)
    return place is not None and family.tensors[place.template].axes[0] == "experts"


def fallbacks(
    checkpoint: Checkpoint, config: QuantizeConfig, chosen: dict[str, Scheme]
) -> list[str]:
    """A line for each kind of layer that did not get the scheme asked for, because of its width."""
    seen: Counter[tuple[str, int, str]] = Counter()
    for module, scheme in chosen.items():
        rule = _first(tuple(config.rules), module)
        wanted = formats.find_scheme(config.rules[rule] if rule else config.scheme)
        if wanted != scheme:
            columns = checkpoint.shapes[module + WEIGHT][1]
            seen[wanted.name, columns, scheme.name] += 1
    return [
        f"{count} layers with {columns} columns, no multiple of the group of {wanted}: {given}"
        for (wanted, columns, given), count in seen.items()
    ]


def _same_for_experts(found: dict[str, Scheme], checkpoint: Checkpoint, family: Family) -> None:
    """Readers stack experts, so that all get the scheme that every width of theirs allows."""
    experts = _experts(found, family)
    asked = {found[module].name for module in experts}
    for module in experts:
        for other in experts:
            columns = checkpoint.shapes[other + WEIGHT][1]
            found[module] = found[module].fitting(columns)
    if len({found[module].name for module in experts}) > 1:
        raise UserError(f"experts are stacked by readers and need one scheme: not {sorted(asked)}")


def _experts(found: dict[str, Scheme], family: Family) -> list[str]:
    places = {module: family.find(module + WEIGHT) for module in found}
    return [module for module, place in places.items() if place and place.expert is not None]


def _check_readers(found: dict[str, Scheme], checkpoint: Checkpoint, family: Family) -> None:
    """Raise UserError for what transformers cannot open, though compressed-tensors can say it."""
    names = sorted({scheme.name for scheme in found.values()})
    zeros = [scheme.name for scheme in found.values() if not scheme.symmetric]
    if zeros and len(names) > 1:
        widths = {checkpoint.shapes[module + WEIGHT][1] for module in found}
        fit = [g for g in (128, 64, 32) if not any(width % g for width in widths)]
        advice = f"int4-g{fit[0]}-asym fits all layers here; or" if fit else "here,"
        raise UserError(
            f"{zeros[0]} would stand beside {', '.join(n for n in names if n != zeros[0])}, and "
            f"transformers reads zero points only where all layers have one scheme: {advice} take "
            f"the symmetric {zeros[0].removesuffix(formats.ASYMMETRIC)}"
        )
    for module in _experts(found, family):
        if zeros or found[module].name == "int8-dynamic":
            raise UserError(
                f"{found[module].name}: transformers cannot open it in a mixture of experts; take "
                "int8, fp8 or a symmetric int4"
            )


def _check_patterns(config: QuantizeConfig, modules: list[str]) -> None:
    for field, patterns in {"keep": config.keep, "rules": tuple(config.rules)}.items():
        for pattern in patterns:
            if not any(re.search(pattern, module) for module in modules):
                names = sorted({module.rpartition(".")[2] for module in modules})
                raise UserError(
                    f"{field}: {pattern!r} matches no module of this model; there are, for "
                    f"instance, {modules[1]}, and by their last name {', '.join(names)}"
                )


def _first(patterns: tuple[str, ...], module: str) -> str | None:
    return next((pattern for pattern in patterns if re.search(pattern, module)), None)
