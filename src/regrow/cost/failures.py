"""Time that a long run on many devices loses to stragglers, checkpoints and failures.

Assumptions: all devices wait for the slowest one in each step. The step times of the devices vary
independently of each other, log-normally. Failures are independent of each other and of their past
(exponential times between them), and each stops the whole job. A failed job starts again from the
last checkpoint, after `restart_seconds`. Failures also strike while a checkpoint is written, and
while the job starts again. Writing a checkpoint stops the training.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt
from random import Random
from statistics import NormalDist

DEVICE_MTBF_HOURS = 54 * 24 * 16_384 / 419
"""Hours between failures of one device, about 50,700: 419 unexpected interruptions of 16,384 H100
in 54 days (The Llama 3 Herd of Models, 2024, arXiv:2407.21783, table 5)."""
NORMAL = NormalDist()


def young_interval(checkpoint_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of training between two checkpoints (Young, 1974, doi:10.1145/361147.361115).

    √(2·δ·M), with the time δ to write a checkpoint and the job's mean time M between failures.
    """
    return sqrt(2 * checkpoint_seconds * mtbf_seconds)


def daly_interval(checkpoint_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of training between two checkpoints (Daly, 2006, doi:10.1016/j.future.2004.11.016).

    √(2·δ·M) · (1 + ⅓·√(δ/2M) + ⅑·δ/2M) − δ for δ < 2·M, else M.
    """
    ratio = checkpoint_seconds / (2 * mtbf_seconds)
    if ratio >= 1:
        return mtbf_seconds
    first = young_interval(checkpoint_seconds, mtbf_seconds)
    return first * (1 + sqrt(ratio) / 3 + ratio / 9) - checkpoint_seconds


def expected_seconds(
    work: float, interval: float, checkpoint: float, restart: float, mtbf: float
) -> float:
    """Expected seconds of a job of `work` seconds (Daly, 2006, equation 20).

    M · e^(R/M) · (e^((τ+δ)/M) − 1) · work/τ, for training τ between checkpoints of δ, restarts R.
    """
    return mtbf * exp(restart / mtbf) * (exp((interval + checkpoint) / mtbf) - 1) * work / interval


def slowest(devices: int, spread: float) -> float:
    """The median of the slowest of `devices` step times, whose own median is 1.

    The logarithms of the times are normal with the standard deviation `spread`. It is
    e^(spread · z) with z, the quantile of the normal distribution at 0.5^(1/devices).
    """
    return exp(spread * NORMAL.inv_cdf(0.5 ** (1 / devices))) if spread else 1.0


@dataclass(frozen=True)
class LongRun:
    """A job on many devices."""

    steps: int
    step_seconds: float
    """Seconds of a step on a median device."""
    devices: int
    checkpoint_seconds: float
    restart_seconds: float
    spread: float = 0.0
    """Standard deviation of the logarithm of a device's step time."""
    device_mtbf_hours: float = DEVICE_MTBF_HOURS

    @property
    def mtbf_seconds(self) -> float:
        """Mean seconds between failures of the job."""
        return self.device_mtbf_hours * 3600 / self.devices

    def every(self) -> int:
        """Steps between checkpoints by Daly's formula, at least one."""
        seconds = daly_interval(self.checkpoint_seconds, self.mtbf_seconds)
        return max(1, round(seconds / (self.step_seconds * slowest(self.devices, self.spread))))


@dataclass(frozen=True)
class Timeline:
    """Where the seconds of a simulated run went; they add up to `total`."""

    training: float
    """Steps that count, on devices that are all of median speed."""
    waiting: float
    """Waiting for the slowest device in the steps that count."""
    checkpoints: float
    lost: float
    """Steps and checkpoints that a failure made void."""
    restarts: float
    failures: int

    @property
    def total(self) -> float:
        """Seconds on the clock."""
        return self.training + self.waiting + self.checkpoints + self.lost + self.restarts

    @property
    def goodput(self) -> float:
        """Share of the time that is training on devices of median speed."""
        return self.training / self.total


def simulate(run: LongRun, every: int, seed: int = 0) -> Timeline:
    """Simulate a run with a checkpoint after each `every` steps, and after the last one."""
    draw = Random(seed)
    failure = draw.expovariate(1 / run.mtbf_seconds)
    done = failures = 0
    now = training = waiting = written = lost = restarts = 0.0
    while done < run.steps:
        count = min(every, run.steps - done)
        times = [_step(run, draw) for _ in range(count)]
        segment = sum(times) + run.checkpoint_seconds
        if now + segment <= failure:
            now += segment
            done += count
            training += count * run.step_seconds
            waiting += sum(times) - count * run.step_seconds
            written += run.checkpoint_seconds
            continue
        lost += failure - now
        now, failures = failure, failures + 1
        failure = now + draw.expovariate(1 / run.mtbf_seconds)
        while now + run.restart_seconds > failure:  # it fails again while it starts
            restarts += failure - now
            now, failures = failure, failures + 1
            failure = now + draw.expovariate(1 / run.mtbf_seconds)
        now += run.restart_seconds
        restarts += run.restart_seconds
    return Timeline(training, waiting, written, lost, restarts, failures)


def _step(run: LongRun, draw: Random) -> float:
    """Seconds of one step: the slowest of all devices, drawn by the inverse distribution."""
    if not run.spread:
        return run.step_seconds
    share = max(draw.random(), 1e-12) ** (1 / run.devices)
    return run.step_seconds * exp(run.spread * NORMAL.inv_cdf(min(share, 1 - 1e-15)))
