"""The simulator of long runs: against formulas, and against the same thing done one by one."""

from __future__ import annotations

from math import exp
from random import Random
from statistics import fmean, median

import pytest

from regrow.cost.failures import (
    LongRun,
    daly_interval,
    expected_seconds,
    simulate,
    slowest,
    young_interval,
)

RUN = LongRun(
    steps=20_000,
    step_seconds=10.0,
    devices=512,
    checkpoint_seconds=60.0,
    restart_seconds=600.0,
    device_mtbf_hours=4_000.0,
)
"""A failure in each 7.8 hours: many of them in the 56 hours of the run."""


def mean_total(every: int, seeds: int) -> float:
    return fmean(simulate(RUN, every, seed).total for seed in range(seeds))


def test_intervals() -> None:
    assert young_interval(50.0, 10_000.0) == pytest.approx(1000.0)
    # 1000 · (1 + 0.05 / 3 + 0.0025 / 9) − 50
    assert daly_interval(50.0, 10_000.0) == pytest.approx(966.944, abs=1e-3)
    assert daly_interval(300.0, 100.0) == 100.0


def test_dalys_interval_is_the_best_of_his_formula() -> None:
    mtbf = RUN.mtbf_seconds
    best = min(range(60, 20_000, 10), key=lambda tau: expected_seconds(1e6, tau, 60.0, 600.0, mtbf))
    assert daly_interval(60.0, mtbf) == pytest.approx(best, rel=0.01)


def test_the_simulation_takes_the_expected_time() -> None:
    """Mean of 60 runs against Daly's formula."""
    for every in (60, 180, 600):
        formula = expected_seconds(200_000.0, every * 10.0, 60.0, 600.0, RUN.mtbf_seconds)
        assert mean_total(every, 60) == pytest.approx(formula, rel=0.02)


def test_the_best_interval_of_the_simulation_is_near_dalys() -> None:
    """A third and three times of it take longer, by the same draws of failures."""
    every = RUN.every()
    assert every == pytest.approx(daly_interval(60.0, RUN.mtbf_seconds) / 10, abs=1)
    best = mean_total(every, 60)
    assert best < mean_total(every // 3, 60)
    assert best < mean_total(every * 3, 60)


def test_the_seconds_add_up() -> None:
    run = LongRun(50, 2.0, 8, checkpoint_seconds=3.0, restart_seconds=5.0)
    timeline = simulate(run, every=20)
    assert (timeline.failures, timeline.lost, timeline.restarts) == (0, 0.0, 0.0)
    assert timeline.total == 50 * 2.0 + 3 * 3.0  # after steps 20, 40 and 50
    assert timeline.goodput == pytest.approx(100 / 109)
    many = simulate(RUN, RUN.every(), seed=1)
    assert many.failures > 0
    assert many.lost > 0
    assert many.restarts >= 600.0


def test_stragglers_are_the_slowest_of_all_devices() -> None:
    """Against the slowest of 64 drawn one by one."""
    draw = Random(0)
    one_by_one = [max(exp(draw.gauss(0, 0.1)) for _ in range(64)) for _ in range(1500)]
    assert slowest(64, 0.1) == pytest.approx(median(one_by_one), rel=0.01)
    assert slowest(1, 0.1) == pytest.approx(1.0)
    run = LongRun(3000, 1.0, 64, 0.0, 0.0, spread=0.1, device_mtbf_hours=1e9)
    timeline = simulate(run, every=100)
    assert timeline.total / 3000 == pytest.approx(fmean(one_by_one), rel=0.01)
    assert timeline.waiting == pytest.approx(timeline.total - 3000)
