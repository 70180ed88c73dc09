"""Latency on this machine: measured for some models, predicted from a fit for other shapes.

A search with a limit in milliseconds chooses shapes by prediction, and times its finalists.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from regrow import families
from regrow.errors import UserError
from regrow.families import Family
from regrow.plan import Plan
from regrow.pruning.config import PruneConfig
from regrow.pruning.sorted_model import first_units
from regrow.runtime.greedy import decode, prefill
from regrow.runtime.progress import progress, say
from regrow.search.score import CutScorer
from regrow.search.shapes import Shape, refit
from regrow.search.targets import Limit, Target, target_of

DECODED = 8  # tokens per run
REPEATS = 3  # runs after a warm-up


@dataclass(frozen=True)
class Latency:
    """Milliseconds at batch size 1 to process a prompt, and per token generated after it."""

    prefill_ms: float
    decode_ms: float


def timed(model: PreTrainedModel, prompt_tokens: int, repeats: int = REPEATS) -> Latency:
    """Median over `repeats` runs after a warm-up: a prompt of random tokens, then generation."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(model.device)
    runs = []
    for _ in range(repeats + 1):
        times = [_now(model.device)]
        token, cache = prefill(model, ids_1T)
        times.append(_now(model.device))
        for _ in islice(decode(model, token, cache), DECODED):
            pass
        times.append(_now(model.device))
        runs.append((times[1] - times[0], (times[2] - times[1]) / DECODED))
    read, per_token = (1000 * median(values) for values in zip(*runs[1:], strict=True))
    return Latency(read, per_token)


class LatencyModel:
    """Milliseconds as a sum of non-negative costs, fitted to timed shapes by least squares.

    t = c₀ + layers · (c₁ + c₂ · heads + c₃ · attention parameters + c₄ · MLP parameters) + c₅ ·
    head parameters. The errors are relative, so that small shapes count as much as large ones.
    """

    def __init__(
        self, family: Family, config: dict[str, Any], samples: list[tuple[dict[str, int], Latency]]
    ) -> None:
        self.family, self.config = family, config
        rows = torch.tensor([self._features(sizes) for sizes, _ in samples], dtype=torch.float64)
        self._scale = rows.abs().amax(0).clamp_min(1.0)
        self._costs = {
            key: _non_negative(
                rows / self._scale,
                torch.tensor([vars(latency)[key] for _, latency in samples], dtype=torch.float64),
            )
            for key in ("prefill_ms", "decode_ms")
        }

    def predict(self, sizes: dict[str, int]) -> Latency:
        """The latency of a shape; missing sizes are those of the whole model."""
        features = torch.tensor(self._features(sizes), dtype=torch.float64) / self._scale
        return Latency(**{key: float(features @ costs) for key, costs in self._costs.items()})

    def _features(self, sizes: dict[str, int]) -> list[float]:
        full = {**self.family.sizes(self.config), **sizes}
        layers = full["layers"]
        one, two = (self._count({**full, "layers": n}) for n in (1, 2))
        attention = self._count({**full, "layers": 2, "mlp": 0}) - self._count(
            {**full, "layers": 1, "mlp": 0}
        )
        mlp = two - one - attention
        head = full["vocab"] * full["hidden"]
        return [1.0, layers, layers * full["heads"], layers * attention, layers * mlp, head]

    def _count(self, sizes: dict[str, int]) -> int:
        return self.family.count(self.config, sizes)


def shapes_to_time(
    family: Family, config: dict[str, Any], multiple_of: int
) -> list[dict[str, int]]:
    """A dozen legal shapes, the whole model first, that differ in every term of the fit."""
    full = family.sizes(config)

    def at(**shares: float) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for dim, share in shares.items():
            step = family.step(dim, config, multiple_of, **{**full, **sizes})
            sizes[dim] = max(step, int(share * full[dim]) // step * step)
            if dim == "kv_heads":
                sizes["heads"] = full["heads"] // full["kv_heads"] * sizes["kv_heads"]
        return {dim: size for dim, size in sizes.items() if size != full[dim]}

    tried = [
        at(), at(layers=0.75), at(layers=0.5), at(layers=0.25), at(mlp=0.75), at(mlp=0.5),
        at(mlp=0.25), at(kv_heads=0.5), at(kv_heads=0.67, mlp=0.75), at(hidden=0.75),
        at(kv_heads=0.67, hidden=0.75), at(layers=0.5, mlp=0.5),
    ]  # fmt: skip
    legal = [sizes for sizes in tried if families.can_have(family, config, sizes, multiple_of)]
    distinct = {tuple(sorted(sizes.items())): sizes for sizes in legal}
    return list(distinct.values())


def _non_negative(rows_ND: torch.Tensor, times_N: torch.Tensor) -> torch.Tensor:
    """argmin over c ≥ 0 of Σ ((rows · c) / t − 1)²; the most negative cost is set to 0 in turn."""
    weighted = rows_ND / times_N[:, None]
    kept = list(range(rows_ND.shape[1]))
    ones = torch.ones(len(times_N), 1, dtype=torch.float64)
    while True:
        # gelsd: columns may be linearly dependent, as when all legal shapes have one hidden size
        solution = torch.linalg.lstsq(weighted[:, kept], ones, driver="gelsd").solution[:, 0]
        if len(kept) == 1 or float(solution.min()) >= 0:
            break
        kept.pop(int(solution.argmin()))
    costs = torch.zeros(rows_ND.shape[1], dtype=torch.float64)
    costs[kept] = solution.clamp_min(0)
    return costs


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


TRIES = 4  # attempts to make a shape smaller that was measured too slow

Row = dict[str, Any]


class Timing:
    """Times cut models, and converts limits on latency into targets for shapes."""

    def __init__(self, scorer: CutScorer, config: PruneConfig) -> None:
        self.scorer, self.config = scorer, config
        self.family, self.parent = scorer.dense.family, scorer.dense.config
        self.base = target_of(self.family, self.parent, config)
        self.fitted: LatencyModel | None = None

    def target(self) -> Target:
        """The whole target with predicted latencies; the first call times a dozen shapes."""
        if self.fitted is None:
            samples = []
            sizes = shapes_to_time(self.family, self.parent, self.config.multiple_of)
            with progress("search, timing", len(sizes), "shapes") as counter:
                for some in sizes:
                    samples.append(
                        (some, self.measure(first_units(self.family, self.parent, some)))
                    )
                    counter.advance(1)
            self.fitted = LatencyModel(self.family, self.parent, samples)
            self.fastest = min(samples, key=lambda sample: sample[1].prefill_ms)[1]
        return Target(self.base.keep_params, (*self.base.limits, *self._limits(self.fitted)))

    def measure(self, plan: Plan) -> Latency:
        """The latency of the model cut by this plan, measured on this machine."""
        return timed(self.scorer.model(plan), self.config.prompt_tokens)

    def time(self, rows: list[Row], remake: Callable[[Shape], Row]) -> tuple[list[Row], list[Row]]:
        """The rows that are fast enough, with their latencies, and the rows that are too slow.

        A row that exceeds a limit is made smaller (`remake` builds a row from a shape) and timed
        again, a few times. Raises UserError when no row is fast enough.
        """
        good, slow = list[Row](), list[Row]()
        with progress("search, timing", len(rows), "shapes") as counter:
            for row in rows:
                row = self._timed(row, remake)
                (slow if self._excess(row) > 1 else good).append(row)
                counter.advance(1)
        if not good:
            quickest = min(slow, key=self._excess)
            raise UserError(
                f"{self.target()}: none of {len(slow)} shapes was fast enough when timed; the "
                f"nearest took {quickest['prefill_ms']:.1f} ms to read {self.config.prompt_tokens} "
                f"tokens and {quickest['decode_ms']:.1f} ms per token after; give at least that"
            )
        if slow:
            say(f"search: {len(slow)} of {len(rows)} shapes were too slow when timed")
        return good, slow

    def _timed(self, row: Row, remake: Callable[[Shape], Row]) -> Row:
        row |= vars(self.measure(row["plan"]))
        for _ in range(TRIES if self.config.timed else 0):
            excess = self._excess(row)
            if excess <= 1:
                break
            target = self._tightened(row["sizes"], excess)
            shape = Shape(row["name"], row["sizes"], row["parameters"])
            smaller = refit(self.family, self.parent, target, self.config.multiple_of, shape)
            if smaller is None or smaller.sizes == row["sizes"]:
                break
            row = {**row, **remake(smaller), "kl": row["kl"], "round": row["round"]}
            row |= vars(self.measure(row["plan"]))
        return row

    def _excess(self, row: Row) -> float:
        """The largest ratio of a latency to its limit; it is at most 1 when all limits are met."""
        asked = {key: getattr(self.config, f"max_{key}") for key in ("prefill_ms", "decode_ms")}
        return max((row[key] / most for key, most in asked.items() if most is not None), default=0)

    def _limits(self, fitted: LatencyModel) -> tuple[Limit, ...]:
        tokens = self.config.prompt_tokens
        limits = []
        if (most := self.config.max_prefill_ms) is not None:
            basis = f"for a prompt of {tokens} tokens, as predicted"
            limits.append(
                Limit("max_prefill_ms", most, lambda s: fitted.predict(s).prefill_ms, basis)
            )
        if (most := self.config.max_decode_ms) is not None:
            basis = f"per token after {tokens} tokens, as predicted"
            limits.append(
                Limit("max_decode_ms", most, lambda s: fitted.predict(s).decode_ms, basis)
            )
        return tuple(limits)

    def _tightened(self, sizes: dict[str, int], excess: float) -> Target:
        """The target with latency limits below the predictions for `sizes`, divided by `excess`."""
        target = self.target()
        limits = tuple(
            replace(limit, most=min(limit.most, limit.value(sizes)) / excess * 0.99)
            if limit.key.endswith("_ms")
            else limit
            for limit in target.limits
        )
        return replace(target, limits=limits)
