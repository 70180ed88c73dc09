"""Find a table on a tiny copy of a config, and prove each of its dimensions there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from regrow.errors import reason_of
from regrow.families._derive import axes, disk, modules, norms, prove
from regrow.families._derive.axes import Found, Layout
from regrow.families._derive.prove import NotProvenError, Subject
from regrow.families._derive.stock import UnsupportedError, build, shapes, silent
from regrow.families._derive.table import Facts, assemble
from regrow.families._derive.tiny import HEADS, KV_HEADS, Tiny, template_of
from regrow.families._derive.whole import prove_whole
from regrow.families._table import Family

DIMS = ("mlp", "expert_mlp", "heads", "kv_heads", "hidden", "vocab", "experts", "layers")
"""The dimensions in the order of their proofs: the first ones decide fused layouts."""
MOST_TRIALS = 16
Choice = dict[str, tuple[Layout | None, ...]]


@dataclass
class Findings:
    """What was found on a tiny copy; independent of the sizes of the real config."""

    found: Found
    choice: dict[str, tuple[Layout | None, ...]]
    facts: Facts
    proven: tuple[str, ...]
    odd: dict[str, str]


def find(tiny: Tiny) -> Findings:
    """Find and prove the table of a tiny config."""
    found, config = axes.find_axes(tiny)
    with silent():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # some vectors keep the random values of the class
            model: Any = build(config, "cpu")
        if not isinstance(getattr(model.base_model, "layers", None), torch.nn.ModuleList):
            raise UnsupportedError("its layers are not in base_model.layers")
        prove.randomize(model)
        tensors, ids = disk.written(model), _ids(config)
        facts = norms.find_norms(model, found, config)
        facts.memory = disk.on_disk(model, tensors)
        facts.scaled_embedding = modules.scales_embedding(model, ids, config["hidden_size"])
        facts.heads_divide_hidden = _heads_divide_hidden(config)
        subject = Subject(config, tensors, ids)
        choice, proven = _prove_each(subject, tiny, found, facts)
        family = _family(config, tiny, found, choice, facts)
        for key, value in modules.measured(model, family, found, ids).items():
            setattr(facts, key, value)
        proven = [dim for dim in proven if _measurable(dim, found, facts)]
        odd = _whole(_family(config, tiny, found, choice, facts), subject, found, proven)
        facts.mixes = odd.get("documents", "")
    return Findings(found, choice, facts, tuple(proven), odd)


def _prove_each(
    subject: Subject, tiny: Tiny, found: Found, facts: Facts
) -> tuple[Choice, list[str]]:
    """The layouts under which the dimensions can be cut, and those that can."""
    choice: Choice = {
        name: tuple(layouts[0] if layouts else None for layouts in each)
        for name, each in found.layouts.items()
    }
    proven = []
    together = subject.config[found.keys["heads"]] == subject.config[found.keys["kv_heads"]]
    for dim in DIMS:
        if dim == "heads" and together:
            continue  # they are cut with their KV heads
        if dim in found.keys and dim not in found.refused:
            better = _proven(subject, tiny, found, choice, facts, dim)
            if better is not None:
                choice = better
                proven.append(dim)
    if together and "kv_heads" in proven:
        proven.append("heads")
    elif together:
        found.refused.setdefault("heads", found.refused.get("kv_heads", ""))
    return choice, proven


def _ids(config: dict[str, Any]) -> Any:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(4, config["vocab_size"], (2, 12), generator=draw)


def _family(config: Any, tiny: Tiny, found: Found, choice: Any, facts: Facts) -> Family:
    """The table of the tiny model itself."""
    kinds: dict[str, list[int]] = {}
    for name in shapes(config):
        template, layer = template_of(name)
        if layer is not None:
            kinds.setdefault(template, []).append(layer)
    having = {template: tuple(sorted(layers)) for template, layers in kinds.items()}
    return assemble(config, axes.of_templates(config), tiny, having, found, choice, facts)


def _options(found: Found, choice: Any, dim: str) -> Iterator[dict[str, tuple[Layout | None, ...]]]:
    """The choices of layouts that differ from `choice` in axes with `dim`, the likeliest first."""
    open_: list[tuple[str, int, list[Layout]]] = []
    dims = {dim, "heads" if dim == "kv_heads" else dim}
    for name, each in found.layouts.items():
        for axis, layouts in enumerate(each):
            if len(layouts) > 1 and dims & {*layouts[0][0]}:
                open_.append((name, axis, layouts))
    for picked in list(product(*(layouts for *_, layouts in open_)))[:MOST_TRIALS]:
        new = dict(choice)
        for (name, axis, _), layout in zip(open_, picked, strict=True):
            new[name] = tuple(layout if n == axis else old for n, old in enumerate(new[name]))
        yield new


def _proven(
    subject: Subject, tiny: Tiny, found: Found, choice: Any, facts: Facts, dim: str
) -> dict[str, tuple[Layout | None, ...]] | None:
    """The choice of layouts under which a dimension can be cut; None, and a refusal, if none is."""
    reason = ""
    for trial in _options(found, choice, dim):
        try:
            family = _family(subject.config, tiny, found, trial, facts)
            prove.prove(family, subject, dim)
        except NotProvenError as error:
            reason = reason or str(error)
            continue
        except Exception as error:  # whatever a model class raises
            reason = reason or reason_of(error)
            continue
        return trial
    found.refused[dim] = reason
    return None


def _measurable(dim: str, found: Found, facts: Facts) -> bool:
    if dim in ("experts", "expert_mlp") and "experts" not in facts.observe:
        found.refused[dim] = "its experts compute something that no criterion can measure yet"
    return dim not in found.refused


def _whole(family: Family, subject: Subject, found: Found, proven: list[str]) -> dict[str, str]:
    try:
        return prove_whole(family, subject, proven)
    except NotProvenError as error:
        for dim in proven:
            found.refused[dim] = f"cut together with the others: {error}"
        proven.clear()
        return {}


def _heads_divide_hidden(config: dict[str, Any]) -> bool:
    """Whether the class refuses a hidden_size that is no multiple of the number of heads."""
    if not config.get("head_dim"):
        return False
    trial = {**config, HEADS: 5}
    if isinstance(config.get(KV_HEADS), int):
        trial[KV_HEADS] = 5 if config[KV_HEADS] == config[HEADS] else 1
    built = []
    for hidden in (88, 80):
        try:
            build({**trial, "hidden_size": hidden})
            built.append(hidden)
        except Exception as error:  # whatever the class raises for sizes that do not fit
            reason_of(error)
    return built == [80]
