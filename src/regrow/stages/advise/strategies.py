"""All ways to a smaller model, from doing nothing to a tiny model for one task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from regrow.cost import jobs
from regrow.cost.devices import find
from regrow.cost.model import ModelSize
from regrow.errors import UserError
from regrow.search.shapes import Shape, candidates
from regrow.stages.advise import recipes
from regrow.stages.advise.answers import BITS, Answer, Limits, over_budget
from regrow.stages.advise.config import AdviseConfig
from regrow.stages.advise.tables import Evidence, of_format, of_pruning, siblings, table

KEEP = (0.8, 0.65, 0.5, 0.35)
"""Shares of the parameters that are tried."""
TOKENS = (1e6, 1e7, 1e8, 1e9, 2.5e9, 2e10, 9.4e10)
"""Budgets of a distillation that are tried; the largest is that of the published runs."""
GPU_FORMATS, OTHER_FORMATS = ("bf16", "fp8", "int4"), ("bf16", "Q8_0", "Q4_K_M")
TINY = {"layers": 12, "hidden": 512, "mlp": 1536, "heads": 8, "kv_heads": 4, "head_dim": 64}
TINY |= {"vocab": 16384}
"""Shape of a tiny model for one task."""
UNKNOWN = Evidence((0.0, 0.0), "nobody has measured this for your model: evaluate it", "none")


def answers(name: str, model: ModelSize, config: AdviseConfig) -> list[Answer]:
    """All ways, each with the targets and the budget that it misses."""
    limits = Limits.of(model, config)
    ways = [
        *_stored(name, model, config, limits),
        *_smaller(name, model, config, limits),
        *_pruned(name, model, config, limits),
        *(_tiny(name, model, config, limits) if config.task == "narrow" else ()),
    ]
    return [_checked(each, config, limits) for each in ways]


def formats_of(limits: Limits, config: AdviseConfig) -> tuple[str, ...]:
    """Storage formats that programs open on the device."""
    if config.plain:
        return ("bf16",)
    return OTHER_FORMATS if limits.device.bf16_tflops is None else GPU_FORMATS


def _checked(answer: Answer, config: AdviseConfig, limits: Limits) -> Answer:
    misses = limits.missed(answer.size, answer.format, config)
    misses += over_budget(answer.cost, config)
    if answer.loss is not None and answer.loss[0] > config.tolerated_loss:
        misses.append(
            f"loses {answer.loss[0]:g} points or more, tolerated {config.tolerated_loss:g}"
        )
    return replace(answer, misses=misses)


def _stored(name: str, model: ModelSize, config: AdviseConfig, limits: Limits) -> Iterator[Answer]:
    """The model as it is, and in fewer bits."""
    for format in formats_of(limits, config):
        evidence = of_format(BITS[format])
        title = f"store it in {format}"
        if format == "bf16":
            title = "do nothing: the model as it is"
        yield Answer(
            name="as-it-is" if format == "bf16" else format.lower().replace("_", "-"),
            kind="stored",
            title=title,
            reason=evidence.text,
            source=evidence.source,
            size=model,
            format=format,
            loss=evidence.points,
            recipe=None if format == "bf16" else recipes.stored(name, format, config),
        )


def _smaller(name: str, model: ModelSize, config: AdviseConfig, limits: Limits) -> Iterator[Answer]:
    """A smaller model of the same family: as it is, and taught by the larger one."""
    for sibling in siblings(model):
        for format in formats_of(limits, config):
            stored = of_format(BITS[format])
            known = sibling.evidence
            short = sibling.name.partition("/")[2].lower() + _suffix(format)
            loss = None if known is None else _sum(known.points, stored.points)
            says = UNKNOWN if known is None else known
            yield Answer(
                name=short,
                kind="smaller",
                title=f"take {sibling.name}, which exists already{_in(format)}",
                reason=f"{says.text}; it costs nothing to try",
                source=says.source,
                size=sibling.size,
                format=format,
                loss=loss,
                recipe=recipes.stored(sibling.name, format, config),
            )
            taught = _taught(sibling.name, name, sibling.size, model, config)
            if taught is not None:
                tokens, cost = taught
                yield Answer(
                    name=f"distil-{short}",
                    kind="taught",
                    title=f"distil it into {sibling.name}{_in(format)}",
                    reason=f"a pretrained smaller model learns from it; alone: {says.text}",
                    source=says.source,
                    size=sibling.size,
                    format=format,
                    loss=loss,
                    tokens=tokens,
                    cost=cost,
                    recipe=recipes.taught(sibling.name, name, tokens, format, config),
                )


def _pruned(name: str, model: ModelSize, config: AdviseConfig, limits: Limits) -> Iterator[Answer]:
    """A cut, distillation, and fewer bits after it."""
    narrow = table("evidence")["narrow"]
    for keep in KEEP:
        try:
            shape = _balanced(candidates(model.family, model.config, keep, 128), model)
        except UserError:  # no shape of this size
            continue
        size = model.resized(**shape.sizes)
        taught = _training(size, model, keep, config)
        if taught is None:
            continue
        tokens, cost, evidence = taught
        for format in formats_of(limits, config):
            stored = of_format(BITS[format])
            loss = None if evidence is None else _sum(evidence.points, stored.points)
            says = UNKNOWN if evidence is None else evidence
            if config.task == "narrow":
                loss, says = None, Evidence((0, 0), narrow["text"], narrow["source"])
            sizes = ", ".join(f"{dim} {n}" for dim, n in shape.sizes.items())
            yield Answer(
                name=f"prune-{round(100 * keep)}{_suffix(format)}",
                kind="pruned",
                title=f"prune to {keep:.0%} ({sizes}), distil on {tokens:,.0f} tokens{_in(format)}",
                reason=says.text + ("" if format == "bf16" else f"; then {stored.text}"),
                source=says.source + ("" if format == "bf16" else f"; {stored.source}"),
                size=size,
                format=format,
                loss=loss,
                tokens=tokens,
                cost=cost,
                recipe=recipes.pruned(name, keep, tokens, format, config),
            )


def _balanced(shapes: list[Shape], model: ModelSize) -> Shape:
    """The shape whose most cut dimension keeps the largest share of its size."""

    def least(shape: Shape) -> float:
        return min(size / model.sizes[dim] for dim, size in shape.sizes.items())

    return max(shapes, key=least)


def _tiny(name: str, model: ModelSize, config: AdviseConfig, limits: Limits) -> Iterator[Answer]:
    """A tiny model with random weights for one task: its config.json is given beside the recipe."""
    size = model.resized(**TINY)
    size = ModelSize({**size.config, "tie_word_embeddings": True})
    tokens = _affordable(size, model, config)
    if tokens is None:
        return
    yield Answer(
        name="tiny",
        kind="tiny",
        title=f"a tiny model of {size.parameters / 1e6:.0f} M parameters for the one task",
        reason="for one narrow task only: random weights, 16,384 of the model's tokens, trained on "
        "text of the task that the model labelled; preset:task-tiny begins with a pretrained one",
        source="none",
        size=size,
        format="bf16",
        loss=None,
        tokens=tokens,
        cost=_cost(size, model, tokens, config),
    )


def _training(
    size: ModelSize, model: ModelSize, keep: float, config: AdviseConfig
) -> tuple[float, jobs.Cost, Evidence | None] | None:
    """Tokens, cost and evidence: the fewest tokens with which the loss is tolerated.

    If there are none within the budget: the most tokens that the budget pays for, or None.
    """
    best = None
    for tokens in TOKENS:
        cost = _cost(size, model, tokens, config)
        if over_budget(cost, config):
            break
        evidence = of_pruning(keep, tokens)
        best = (tokens, cost, evidence)
        if evidence is not None and evidence.points[1] <= config.tolerated_loss:
            break
        if config.task == "narrow" and tokens >= 1e8:
            break
    return best


def _taught(
    student: str, teacher: str, size: ModelSize, model: ModelSize, config: AdviseConfig
) -> tuple[float, jobs.Cost] | None:
    """Tokens and cost of a distillation into a smaller model; None if the budget has none."""
    tokens = _affordable(size, model, config)
    return None if tokens is None else (tokens, _cost(size, model, tokens, config))


def _affordable(size: ModelSize, model: ModelSize, config: AdviseConfig) -> float | None:
    """The most tokens up to a billion that the budget pays for."""
    able = [
        t for t in TOKENS if t <= 1e9 and not over_budget(_cost(size, model, t, config), config)
    ]
    return max(able, default=None)


def _cost(size: ModelSize, model: ModelSize, tokens: float, config: AdviseConfig) -> jobs.Cost:
    return jobs.distil(size, model, tokens, find(config.train_on), recipes.length(tokens))


def _sum(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]


def _suffix(format: str) -> str:
    return "" if format == "bf16" else "-" + format.lower().replace("_", "-")


def _in(format: str) -> str:
    return "" if format == "bf16" else f", then {format}"
