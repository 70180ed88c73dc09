"""Latencies in a search: shapes for a limit in milliseconds, and finalists timed one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from regrow.errors import UserError
from regrow.plan import Plan
from regrow.progress import progress, say
from regrow.search.latency import Latency, LatencyModel, shapes_to_time, timed
from regrow.stages.prune.config import PruneConfig
from regrow.stages.prune.gather import first_units
from regrow.stages.prune.shapes import Shape, refit
from regrow.stages.prune.targets import Limit, Target, target_of
from regrow.trial import Trial

TRIES = 4  # times that a shape which proved too slow is made smaller

Row = dict[str, Any]


class Timing:
    """Times models of a trial, and knows what a limit on latency means for a shape."""

    def __init__(self, trial: Trial, config: PruneConfig) -> None:
        self.trial, self.config = trial, config
        self.family, self.parent = trial.dense.family, trial.dense.config
        self.base = target_of(self.family, self.parent, config)
        self.fitted: LatencyModel | None = None

    def target(self) -> Target:
        """The whole target, with predicted latencies: a dozen shapes are timed for them once."""
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
        """The latency of a cut by this plan, here and now."""
        return timed(self.trial.model(plan), self.config.prompt_tokens)

    def time(self, rows: list[Row], remake: Callable[[Shape], Row]) -> tuple[list[Row], list[Row]]:
        """The rows with their latencies, and those that are too slow.

        A row that is slower than its prediction is made smaller (`remake` makes a row of a shape)
        and timed again, a few times. Raises UserError when none is fast enough.
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
        """How often over the limit that is missed most; at most 1 when all are kept."""
        asked = {key: getattr(self.config, f"max_{key}") for key in ("prefill_ms", "decode_ms")}
        return max((row[key] / most for key, most in asked.items() if most is not None), default=0)

    def _limits(self, fitted: LatencyModel) -> tuple[Limit, ...]:
        tokens = self.config.prompt_tokens
        found = []
        if self.config.max_prefill_ms is not None:
            most, how = self.config.max_prefill_ms, f"for a prompt of {tokens} tokens, as predicted"
            found.append(Limit("max_prefill_ms", most, lambda s: fitted.predict(s).prefill_ms, how))
        if self.config.max_decode_ms is not None:
            most, how = self.config.max_decode_ms, f"per token after {tokens} tokens, as predicted"
            found.append(Limit("max_decode_ms", most, lambda s: fitted.predict(s).decode_ms, how))
        return tuple(found)

    def _tightened(self, sizes: dict[str, int], excess: float) -> Target:
        """The target with latencies below what was predicted for `sizes`, by the excess."""
        target = self.target()
        limits = tuple(
            replace(limit, most=min(limit.most, limit.value(sizes)) / excess * 0.99)
            if limit.key.endswith("_ms")
            else limit
            for limit in target.limits
        )
        return replace(target, limits=limits)
