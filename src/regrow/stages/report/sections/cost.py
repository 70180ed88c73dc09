"""Sections on the cost of a run and on the speed of its models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from regrow.stages.report import charts
from regrow.stages.report.evaluated import Evaluated, of
from regrow.stages.report.numbers import SPEED, duration, figure, millions, plain, title
from regrow.stages.report.page import Block, Cell, Chart, Section, Table, text
from regrow.stages.report.run_folder import Run
from regrow.stages.report.sections.training import seconds_of

TOKENS = {"profile": "calibration tokens", "distill": "training tokens", "cache": "tokens"}
"""Figure in the manifest with the number of tokens, by stage."""
NOTE = (
    "FLOPs by the usual rule, N parameters and T tokens: 2·N·T for reading (profile, cache, the "
    "teacher), 6·N·T for training all of a student, 4·N·T for adapters beside frozen weights; a "
    "distillation is T·(6·N_student + 2·N_teacher), for each teacher, none from a cache. "
    "Attention scores, held-out measuring, repair and the choice of shape are not counted; where "
    "a dash stands, N or T was not written down."
)


@dataclass(frozen=True)
class Spent:
    """Cost of one stage; None means unknown."""

    stage: str
    seconds: float
    tokens: float | None
    flops: float | None
    joules: float | None


def section(runs: list[Run]) -> Section | None:
    """A table with a row per stage and a sum per run."""
    rows, marked = [], []
    spent = [(run, each) for run in runs if run.manifests for each in [spent_by(run)]]
    energy = any(one.joules is not None for _, each in spent for one in each)
    for run, each in spent:
        rows += [_row(run.at(one.stage), one, energy) for one in each]
        marked.append(len(rows))
        rows.append(_row(run.at("all"), _sum(each), energy))
    head = ["stage", "time", "tokens", "FLOPs", "FLOP/s", *(["energy"] if energy else [])]
    note = NOTE + (" " + _meters(runs) if energy else "")
    table = Table(head, rows, frozenset(marked))
    return Section("cost", "What it cost", note, [table]) if rows else None


def spent_by(run: Run) -> list[Spent]:
    """Time, tokens, FLOPs and energy of each stage of a run."""
    found = []
    sizes = Sizes(run)
    for name, made in run.manifests.items():
        kind = made["stage"]
        seconds = float(made.get("seconds", 0.0))
        if kind == "distill":
            seconds = max(seconds, seconds_of([r for r in run.metrics if r["stage"] == name]))
        tokens = _figure(made, TOKENS.get(kind, ""))
        each = sizes.flops_per_token(name, made)
        flops = None if tokens is None or each is None else tokens * each
        joules = made.get("energy", {}).get("joules")
        found.append(Spent(name, seconds, tokens, flops, joules))
    return found


class Sizes:
    """Parameters of a run's models by fingerprint, from its evaluation and its prunings."""

    def __init__(self, run: Run) -> None:
        self.known: dict[str, float] = {}
        self.after: dict[str, float] = {}
        """Parameters of the model after each stage, by stage name."""
        for label, some in ((run.evaluation or {}).get("figures") or {}).items():
            fingerprint = run.measured.get(f"model {label}")
            count = next((f["value"] for f in some if f["name"] == "parameters"), None)
            if fingerprint and count:
                self.known[fingerprint] = count
        now = None
        for name, made in run.manifests.items():
            count, share = (_figure(made, n) for n in ("parameters", "kept share of parameters"))
            if made["stage"] == "prune" and count and share:
                self.known.setdefault(made["inputs"].get("model", ""), count / share)
                now = count
            if now is not None:
                self.after[name] = now

    def flops_per_token(self, name: str, made: dict[str, Any]) -> float | None:
        """FLOPs per token by the rule in NOTE; None if a model size is unknown."""
        inputs, config = made.get("inputs", {}), made.get("config", {})
        if made["stage"] in ("profile", "cache"):
            size = self.known.get(inputs.get("model", inputs.get("teacher", "")))
            return None if size is None else 2 * size
        if made["stage"] != "distill":
            return None
        student = self.known.get(inputs.get("student", ""), self.after.get(name))
        teachers = [value for key, value in inputs.items() if key.split(" ")[0] == "teacher"]
        read = [] if "cache" in inputs else [self.known.get(each) for each in teachers]
        known = [count for count in read if count is not None]
        if student is None or len(known) < len(read):
            return None
        trained = 6 if config.get("adapter", "none") == "none" else 4
        return trained * student + 2 * sum(known)


def _figure(made: dict[str, Any], name: str) -> float | None:
    return next((f["value"] for f in made.get("figures", []) if f["name"] == name), None)


def _sum(each: list[Spent]) -> Spent:
    """Sum the known costs of the stages."""

    def total(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    return Spent(
        "all",
        sum(one.seconds for one in each),
        total([one.tokens for one in each]),
        total([one.flops for one in each]),
        total([one.joules for one in each]),
    )


def _row(name: str, one: Spent, energy: bool) -> list[Cell]:
    rate = None
    if one.stage != "all" and one.flops is not None and one.seconds > 0:
        rate = one.flops / one.seconds
    cells = [
        text(name),
        Cell(duration(one.seconds)),
        Cell("–" if one.tokens is None else millions(one.tokens)),
        Cell("–" if one.flops is None else flops(one.flops)),
        Cell("–" if rate is None else flops(rate)),
    ]
    if energy:
        cells.append(Cell("–" if one.joules is None else watt_hours(one.joules)))
    return cells


def flops(value: float) -> str:
    """Format operations such as 1.2 T; the units are M, G, T, P and E."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{plain(value / size)} {unit}"
    return f"{value / 1e6:.3g} M"


def watt_hours(joules: float) -> str:
    """Format energy as 12.3 Wh or 1.23 kWh."""
    hours = joules / 3600
    return f"{hours / 1000:.3g} kWh" if hours >= 1000 else f"{hours:.3g} Wh"


def _meters(runs: list[Run]) -> str:
    made = [
        found["energy"] for run in runs for found in run.manifests.values() if "energy" in found
    ]
    meters = dict.fromkeys(meter for each in made for meter in each["meters"])
    return f"Energy by {', '.join(meters)}, with all else that ran there meanwhile."


RATES = ("prefill", "decode")
SETTING = re.compile(r"prompt of (\d+)\b.*?batch (\d+)")
SPEED_NOTE = (
    "Medians, and 95th percentiles as p95; × is the speed over the teacher's, and ÷ ratio of "
    "FLOPs what that is of the saving in operations."
)


def speed(runs: list[Run]) -> Section | None:
    """A table per batch size and prompt length; None if the result table has all its figures."""
    found = of(runs)
    if found is None:
        return None
    settings: dict[str, list[str]] = {}
    for name in found.names:
        kind, _, setting = name.partition("/")
        if kind in SPEED:
            settings.setdefault(setting, []).append(name)
    if set(settings.get("", [])) <= set(RATES) and len(settings) < 2:
        return None
    blocks: list[Block] = []
    if len(settings) > 1:
        blocks += [_speed_chart(found, kind, list(settings)) for kind in RATES]
    blocks += [_speed_table(found, setting, names) for setting, names in settings.items()]
    return Section("speed", "Speed and memory", SPEED_NOTE, blocks)


def _speed_table(found: Evaluated, setting: str, names: list[str]) -> Table:
    rows = [
        [text(label), *(_speed_cell(found, label, name) for name in names)]
        for label in found.labels
    ]
    head = [title(name.partition("/")[0]) for name in names]
    return Table([f"batch × prompt {_called(found, setting)}", *head], rows)


def _called(found: Evaluated, setting: str) -> str:
    """Name of a setting, such as `1 x 512`; for the first setting, parsed from a convention."""
    if setting:
        return setting
    rows = [row for label in found.labels if (row := found.figure(label, "prefill")) is not None]
    told = [SETTING.search(row.get("convention", "")) for row in rows[:1]]
    return next((f"{one[2]} x {one[1]}" for one in told if one), "as said below")


def _speed_cell(found: Evaluated, label: str, name: str) -> Cell:
    value = found.value(label, name)
    return Cell("–" if value is None else figure(name, value))


def _speed_chart(found: Evaluated, kind: str, settings: list[str]) -> Chart:
    shown = [charts.label(_called(found, setting)) for setting in settings]
    traces = []
    for number, label in enumerate(found.drawn):
        values = [found.value(label, f"{kind}/{s}" if s else kind) for s in settings]
        there = [(x, y) for x, y in zip(shown, values, strict=True) if y is not None]
        if there:
            traces.append(charts.line(label, [x for x, _ in there], [y for _, y in there], number))
    y = charts.axis("tokens/s", rangemode="tozero")
    x = charts.axis("batch × prompt", type="category")
    return Chart(charts.figure(traces, x, y), f"{title(kind)} by batch size and prompt", half=True)
