"""Chooses the scheme of each module from a config's rules and the shapes of a checkpoint."""

from __future__ import annotations

from regrow.calibration.modules import (
    WEIGHT,
    check_patterns,
    first_match,
    is_router,
    linear_modules,
)
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.families import Family
from regrow.quantization import formats
from regrow.quantization.formats import Scheme, StoredTensor, fallback_lines
from regrow.stages.quantize import QuantizeConfig


def choose(checkpoint: Checkpoint, family: Family, config: QuantizeConfig) -> dict[str, Scheme]:
    """The scheme of each module that will be quantized, in the order of the checkpoint.

    Raises UserError for a pattern that matches nothing, for a quantized embedding, when nothing is
    left to quantize, and for a combination that transformers cannot open.
    """
    modules = linear_modules(checkpoint)
    embedding, head = (name.removesuffix(WEIGHT) for name in (family.embedding, family.head))
    check_patterns({"keep": config.keep, "rules": tuple(config.rules)}, [*modules, head])
    chosen = {}
    for module in modules:
        if first_match(config.keep, module) or is_router(family, module + WEIGHT):
            continue
        rule = first_match(tuple(config.rules), module)
        scheme = formats.find_scheme(config.rules[rule] if rule else config.scheme)
        if module == embedding:
            raise UserError(f"{module}: no program reads a quantized embedding; add it to keep")
        if module == head and scheme.dynamic:
            raise UserError(
                f"{module}: {scheme.name} also quantizes inputs, which the head does not allow; "
                "add it to keep, or give it a rule with int8 or int4"
            )
        chosen[module] = scheme.fitting(checkpoint.shapes[module + WEIGHT][1])
    if not chosen:
        raise UserError(
            f"nothing is left to quantize: keep {list(config.keep)} matches every module"
        )
    _same_for_experts(chosen, checkpoint, family)
    if not config.dequantize:
        _check_readers(chosen, checkpoint, family)
    return chosen


def fallbacks(
    checkpoint: Checkpoint, config: QuantizeConfig, chosen: dict[str, Scheme]
) -> list[str]:
    """A line for each kind of layer whose width is not a multiple of its scheme's group size."""
    stored = []
    for module, scheme in chosen.items():
        rule = first_match(tuple(config.rules), module)
        configured = formats.find_scheme(config.rules[rule] if rule else config.scheme)
        name = module + WEIGHT
        stored.append(StoredTensor(name, checkpoint.shapes[name], configured.name, scheme.name))
    return fallback_lines(stored)


def _same_for_experts(chosen: dict[str, Scheme], checkpoint: Checkpoint, family: Family) -> None:
    """Assign one scheme that fits all widths to all experts, because readers stack experts."""
    experts = _experts(chosen, family)
    names = {chosen[module].name for module in experts}
    for module in experts:
        for other in experts:
            columns = checkpoint.shapes[other + WEIGHT][1]
            chosen[module] = chosen[module].fitting(columns)
    if len({chosen[module].name for module in experts}) > 1:
        raise UserError(f"all experts need the same scheme, but the rules give {sorted(names)}")


def _experts(chosen: dict[str, Scheme], family: Family) -> list[str]:
    places = {module: family.find(module + WEIGHT) for module in chosen}
    return [module for module, place in places.items() if place and place.expert is not None]


def _check_readers(chosen: dict[str, Scheme], checkpoint: Checkpoint, family: Family) -> None:
    """Raise UserError for combinations that transformers cannot open."""
    names = sorted({scheme.name for scheme in chosen.values()})
    zeros = [scheme.name for scheme in chosen.values() if not scheme.symmetric]
    if zeros and len(names) > 1:
        widths = {checkpoint.shapes[module + WEIGHT][1] for module in chosen}
        fit = [g for g in (128, 64, 32) if not any(width % g for width in widths)]
        advice = f"int4-g{fit[0]}-asym fits all layers here; or" if fit else "here,"
        raise UserError(
            f"{zeros[0]} together with {', '.join(n for n in names if n != zeros[0])}: "
            f"transformers reads zero points only if all layers have one scheme; {advice} take "
            f"the symmetric {zeros[0].removesuffix(formats.ASYMMETRIC)}"
        )
    for module in _experts(chosen, family):
        if zeros or chosen[module].name == "int8-dynamic":
            raise UserError(
                f"{chosen[module].name}: transformers cannot open it in a mixture of experts; take "
                "int8, fp8 or a symmetric int4"
            )
