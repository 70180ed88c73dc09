"""Advice before anyone spends a GPU hour: which compression, at what loss and what cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from regrow.cost import jobs
from regrow.cost.devices import find
from regrow.cost.memory import TrainingSetup, training_memory
from regrow.cost.model import ModelSize
from regrow.cost.units import size_text
from regrow.errors import UserError
from regrow.runtime.progress import clock
from regrow.stage_dir import refuse_foreign
from regrow.stages.advise import recipes
from regrow.stages.advise.answers import BITS, Answer, Limits, decode_seconds
from regrow.stages.advise.config import AdviseConfig
from regrow.stages.advise.licence import Permission, licence
from regrow.stages.advise.source import open_source
from regrow.stages.advise.strategies import answers
from regrow.stages.advise.tables import siblings

SHOWN = 4
"""Other ways that are shown."""


@dataclass(frozen=True)
class Advice:
    """The answer to a request."""

    model: str
    size: ModelSize
    config: AdviseConfig
    first: tuple[str, ...]
    """What to ask before any training."""
    chosen: Answer | None
    """The mildest way that keeps all targets; None if there is none."""
    others: tuple[Answer, ...]
    """Further ways that keep all targets, or the nearest ones if none does."""
    licence: Permission

    def lines(self) -> list[str]:
        """What to print."""
        found = [
            f"{self.model}: {self.size.config['model_type']}, {self.size.parameters:,} parameters, "
            f"{size_text(self.size.bytes())} in bf16, KV cache "
            f"{self.size.cache_per_token / 1024:,.0f} KiB a token",
            *self.licence.lines(self.config.use),
            "",
            "Ask first:",
            *(f"  {number}. {line}" for number, line in enumerate(self.first, 1)),
            "",
        ]
        if self.chosen is None:
            found.append("No way here keeps all targets. The nearest:")
        else:
            found += ["Advice:", *_described(self.chosen, self.size, self.config), "", "Also:"]
        for answer in self.others:
            found += _described(answer, self.size, self.config)
        return found


def advise(model: str, config: AdviseConfig | None = None, out: str | Path | None = None) -> Advice:
    """Advice on a model by its config alone; with `out` also its lines and recipes as files.

    Raises UserError for a model or a device that is not known.
    """
    config = config or AdviseConfig()
    source = open_source(model)
    size = ModelSize(source.config)
    find(config.train_on)
    ways = answers(source.name, size, config)
    able = sorted((each for each in ways if not each.misses), key=_mildness)
    known = [each for each in able if each.loss is not None]
    chosen = next(iter(known or able), None)
    others = _of_each_kind(known + able, chosen) if chosen else sorted(ways, key=_distance)
    advice = Advice(
        model,
        size,
        config,
        tuple(_first_questions(size, config, ways)),
        chosen,
        tuple(others[:SHOWN]),
        licence(source, config.use),
    )
    if out is not None:
        _write(advice, Path(out))
    return advice


def _mildness(answer: Answer) -> tuple[bool, float, int, int, float]:
    """Order of ways that all keep the targets.

    First those without training, then by loss; where that does not decide, the model with the most
    parameters, in the most bits, for the fewest hours.
    """
    hours = 0.0 if answer.cost is None else answer.cost.device_hours
    size, bits = answer.size.parameters, BITS[answer.format]
    return answer.cost is not None, answer.middle, -size, -bits, hours


def _of_each_kind(ways: list[Answer], chosen: Answer) -> list[Answer]:
    """The first way of each kind beside the chosen one."""
    found: dict[str, Answer] = {}
    for each in ways:
        if each is not chosen:
            found.setdefault(each.kind, each)
    return list(found.values())


def _distance(answer: Answer) -> tuple[int, int]:
    """Order of ways that all miss a target: the fewest misses, then the fewest bytes."""
    return len(answer.misses), answer.bytes


def _first_questions(size: ModelSize, config: AdviseConfig, ways: list[Answer]) -> Iterator[str]:
    """What an expert asks before distilling: cheaper ways, in their order."""
    limits = Limits.of(size, config)
    by_name = {each.name: each for each in ways}
    plain = by_name["as-it-is"]
    if not plain.misses:
        yield "Does it have to be smaller? It keeps all targets as it is."
    else:
        yield f"Does it have to be smaller? Yes: {'; '.join(plain.misses)}."
    names = [each.name for each in siblings(size)]
    if names:
        yield (
            f"Is a smaller model good enough already? Evaluate {', '.join(names[:3])} on your own "
            "task first: `regrow evaluate`."
        )
    else:
        yield (
            "Is a smaller model good enough already? No table here lists smaller ones of this "
            "family: look for one."
        )
    yield _quantization_alone(ways)
    yield _prefix(size, config, limits)
    yield _architecture(size, config)


def _quantization_alone(ways: list[Answer]) -> str:
    stored = [each for each in ways if each.name in ("fp8", "int4", "q8-0", "q4-k-m")]
    able = [each for each in stored if not each.misses]
    if able:
        return f"Does quantization alone do? Yes: {able[0].format}, without training."
    if not stored:
        return "Does quantization alone do? Not asked: the weights must keep 16 bits."
    deepest = stored[-1]
    misses = "; ".join(deepest.misses)
    return f"Does quantization alone do? No, not even {deepest.format}: {misses}."


def _prefix(size: ModelSize, config: AdviseConfig, limits: Limits) -> str:
    seconds = jobs.prefill_seconds(size, limits.device, config.prompt_tokens)
    if seconds is None:
        return (
            "Do prompts share a beginning? Then the program that serves it can cache it; a smaller "
            "model is not needed for that."
        )
    question, whole = "Do prompts share a beginning? Prefix caching loses nothing", 1000 * seconds
    if not config.shared_prefix:
        return f"{question}; a prompt takes {whole:.0f} ms here, and --shared-prefix counts it."
    saved = config.shared_prefix * whole
    share = f"{config.shared_prefix:.0%} of a prompt is shared"
    return f"{question}; {share}: caching saves {saved:.0f} of {whole:.0f} ms."


def _architecture(size: ModelSize, config: AdviseConfig) -> str:
    cache, weights = config.context_length * size.cache_per_token, size.bytes()
    words = (
        f"The KV cache of {config.context_length:,} tokens is {cache / weights:.0%} of the weights"
    )
    if cache > weights / 2:
        return (
            f"Would another architecture do? {words}: a model with fewer KV heads, sliding windows "
            "or a quantized cache gains more than pruning."
        )
    return f"Would another architecture do? {words}: the weights decide, not the cache."


def _described(answer: Answer, before: ModelSize, config: AdviseConfig) -> list[str]:
    """A way in a few lines."""
    device = find(config.device)
    decode = 1000 * decode_seconds(answer.size, device, answer.format, config.context_length)
    loss = "unknown"
    if answer.loss is not None:
        low, high = (round(points, 1) for points in answer.loss)
        loss = f"{low:g} points" if low == high else f"{low:g} to {high:g} points"
    found = [
        f"  [{answer.name}] {answer.title}",
        f"    becomes {size_text(answer.bytes)}, {answer.ratio(before):.1f} × smaller; at best "
        f"{decode:.1f} ms a token on {device.title}; expected loss {loss}",
        f"    why: {answer.reason}",
        f"    source: {answer.source}",
    ]
    if answer.cost is not None:
        found += _cost_lines(answer, before, config)
    if answer.recipe is not None:
        found.append(f"    recipe: {answer.name}.yaml")
    if answer.misses:
        found.append(f"    misses: {'; '.join(answer.misses)}")
    return found


def _cost_lines(answer: Answer, before: ModelSize, config: AdviseConfig) -> list[str]:
    cost, device = answer.cost, find(config.train_on)
    assert cost is not None
    money = "price unknown"
    if cost.money is not None:
        money = f"${cost.money[0]:,.0f} to ${cost.money[1]:,.0f}"
    seconds = 3600 * cost.device_hours / config.gpus
    line = (
        f"    cost: {answer.tokens:,.0f} tokens, {cost.device_hours:,.1f} hours of {device.title} "
        f"({money}), {clock(seconds)} on {config.gpus}"
    )
    count, size = _training_devices(answer, before, config)
    if count:
        how = "" if count == 1 else " with --sharding fsdp"
        return [line, f"    trains on {count} of them{how}: {size_text(size)} each"]
    return [line, f"    does not fit 8 of them ({size_text(size)} each): teach from a cache"]


def _training_devices(answer: Answer, before: ModelSize, config: AdviseConfig) -> tuple[int, float]:
    """The fewest devices of a node on which the distillation fits, and the bytes on each; or 0."""
    device, size = find(config.train_on), 0.0
    length = recipes.length(answer.tokens)
    for count in (1, 2, 4, 8):
        setup = TrainingSetup(
            batch=1,
            length=length,
            checkpointing=True,
            teacher="whole" if count == 1 else "shares",
            sharding="none" if count == 1 else "fsdp",
            devices=count,
        )
        size = training_memory(answer.size, before, setup).total
        if size <= device.bytes:
            return count, size
    return 0, size


def _write(advice: Advice, out: Path) -> None:
    """Write advice.txt and a recipe for each way that has one."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is no folder: give another --out")
    if not (out / "advice.txt").exists():
        refuse_foreign(out, "advise")
    out.mkdir(parents=True, exist_ok=True)
    (out / "advice.txt").write_text("\n".join(advice.lines()) + "\n", encoding="utf-8")
    for answer in (*([advice.chosen] if advice.chosen else []), *advice.others):
        if answer.recipe is not None:
            text = f"# {answer.title}\n" + yaml.safe_dump(answer.recipe, sort_keys=False)
            (out / f"{answer.name}.yaml").write_text(text, encoding="utf-8")
