"""Sections on the cost of a run and on the speed of its models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from regrow.pruning.config import SEARCH
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
    "Attention scores, measurements during training, repair and the choice of shape are not "
    "counted. A dash means that N or T was not recorded."
)


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage; None means unknown."""

    stage: str
    seconds: float
    tokens: float | None
    flops: float | None
    joules: float | None


def section(runs: list[Run]) -> Section | None:
    """A table with a row per stage and a sum per run."""
    rows, marked = [], []
    costs = [(run, stages) for run in runs if run.manifests for stages in [costs_of(run)]]
    energy = any(stage.joules is not None for _, stages in costs for stage in stages)
    for run, stages in costs:
        rows += [_row(run.at(stage.stage), stage, energy) for stage in stages]
        marked.append(len(rows))
        rows.append(_row(run.at("all"), _sum(stages), energy))
    head = ["stage", "time", "tokens", "FLOPs", "FLOP/s", *(["energy"] if energy else [])]
    note = NOTE + (" " + _meters(runs) if energy else "")
    table = Table(head, rows, frozenset(marked))
    return Section("cost", "What it cost", note, [table]) if rows else None


def costs_of(run: Run) -> list[StageCost]:
    """Time, tokens, FLOPs and energy of each stage of a run."""
    costs = []
    sizes = Sizes(run)
    for name, manifest in run.manifests.items():
        kind = manifest["stage"]
        seconds = float(manifest.get("seconds", 0.0))
        if kind == "distill":
            seconds = max(seconds, seconds_of([r for r in run.metrics if r["stage"] == name]))
        tokens = _figure(manifest, TOKENS.get(kind, ""))
        per_token = sizes.flops_per_token(name, manifest)
        flops = None if tokens is None or per_token is None else tokens * per_token
        joules = manifest.get("energy", {}).get("joules")
        if SEARCH in manifest:
            costs.append(StageCost(f"{name}, choice of shape", manifest[SEARCH], None, None, None))
        costs.append(StageCost(name, seconds, tokens, flops, joules))
    return costs


class Sizes:
    """Parameters of a run's models by fingerprint, from its evaluation and its prunings."""

    def __init__(self, run: Run) -> None:
        self.by_fingerprint: dict[str, float] = {}
        self.after: dict[str, float] = {}
        """Parameters of the model after each stage, by stage name."""
        for label, figures in ((run.evaluation or {}).get("figures") or {}).items():
            fingerprint = run.measured.get(f"model {label}")
            count = next((f["value"] for f in figures if f["name"] == "parameters"), None)
            if fingerprint and count:
                self.by_fingerprint[fingerprint] = count
        now = None
        for name, manifest in run.manifests.items():
            count, share = (
                _figure(manifest, n) for n in ("parameters", "kept share of parameters")
            )
            if manifest["stage"] == "prune" and count and share:
                self.by_fingerprint.setdefault(manifest["inputs"].get("model", ""), count / share)
                now = count
            if now is not None:
                self.after[name] = now

    def flops_per_token(self, name: str, manifest: dict[str, Any]) -> float | None:
        """FLOPs per token by the rule in NOTE; None if a model size is unknown."""
        inputs, config = manifest.get("inputs", {}), manifest.get("config", {})
        if manifest["stage"] in ("profile", "cache"):
            size = self.by_fingerprint.get(inputs.get("model", inputs.get("teacher", "")))
            return None if size is None else 2 * size
        if manifest["stage"] != "distill":
            return None
        student = self.by_fingerprint.get(inputs.get("student", ""), self.after.get(name))
        teachers = [value for key, value in inputs.items() if key.split(" ")[0] == "teacher"]
        teacher_counts = (
            []
            if "cache" in inputs
            else [self.by_fingerprint.get(fingerprint) for fingerprint in teachers]
        )
        counts = [count for count in teacher_counts if count is not None]
        if student is None or len(counts) < len(teacher_counts):
            return None
        trained = 6 if config.get("adapter", "none") == "none" else 4
        return trained * student + 2 * sum(counts)


def _figure(manifest: dict[str, Any], name: str) -> float | None:
    return next((f["value"] for f in manifest.get("figures", []) if f["name"] == name), None)


def _sum(stages: list[StageCost]) -> StageCost:
    """Sum the known costs of the stages."""

    def total(values: list[float | None]) -> float | None:
        known_values = [value for value in values if value is not None]
        return sum(known_values) if known_values else None

    return StageCost(
        "all",
        sum(stage.seconds for stage in stages),
        total([stage.tokens for stage in stages]),
        total([stage.flops for stage in stages]),
        total([stage.joules for stage in stages]),
    )


def _row(name: str, cost: StageCost, energy: bool) -> list[Cell]:
    rate = None
    if cost.stage != "all" and cost.flops is not None and cost.seconds > 0:
        rate = cost.flops / cost.seconds
    cells = [
        text(name),
        Cell(duration(cost.seconds)),
        Cell("–" if cost.tokens is None else millions(cost.tokens)),
        Cell("–" if cost.flops is None else flops(cost.flops)),
        Cell("–" if rate is None else flops(rate)),
    ]
    if energy:
        cells.append(Cell("–" if cost.joules is None else watt_hours(cost.joules)))
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
    energies = [
        manifest["energy"]
        for run in runs
        for manifest in run.manifests.values()
        if "energy" in manifest
    ]
    meters = dict.fromkeys(meter for energy in energies for meter in energy["meters"])
    return f"Energy by {', '.join(meters)}; it includes all other work on the machine."


RATES = ("prefill", "decode")
SETTING = re.compile(r"prompt of (\d+)\b.*?batch (\d+)")
SPEED_NOTE = (
    "Medians; p95 is the 95th percentile. × is the speed divided by the teacher's speed. ÷ ratio "
    "of FLOPs divides it by the saving in operations."
)


def speed(runs: list[Run]) -> Section | None:
    """A table per batch size and prompt length; None if the result table has all its figures."""
    evaluated = of(runs)
    if evaluated is None:
        return None
    settings: dict[str, list[str]] = {}
    for name in evaluated.names:
        kind, _, setting = name.partition("/")
        if kind in SPEED:
            settings.setdefault(setting, []).append(name)
    if set(settings.get("", [])) <= set(RATES) and len(settings) < 2:
        return None
    blocks: list[Block] = []
    if len(settings) > 1:
        blocks += [_speed_chart(evaluated, kind, list(settings)) for kind in RATES]
    blocks += [_speed_table(evaluated, setting, names) for setting, names in settings.items()]
    return Section("speed", "Speed and memory", SPEED_NOTE, blocks)


def _speed_table(evaluated: Evaluated, setting: str, names: list[str]) -> Table:
    rows = [
        [text(label), *(_speed_cell(evaluated, label, name) for name in names)]
        for label in evaluated.labels
    ]
    head = [title(name.partition("/")[0]) for name in names]
    return Table([f"batch × prompt {_called(evaluated, setting)}", *head], rows)


def _called(evaluated: Evaluated, setting: str) -> str:
    """Name of a setting, such as `1 x 512`; for the first setting, parsed from a convention."""
    if setting:
        return setting
    rows = [
        row for label in evaluated.labels if (row := evaluated.figure(label, "prefill")) is not None
    ]
    matches = [SETTING.search(row.get("convention", "")) for row in rows[:1]]
    return next((f"{match[2]} x {match[1]}" for match in matches if match), "(see Conventions)")


def _speed_cell(evaluated: Evaluated, label: str, name: str) -> Cell:
    value = evaluated.value(label, name)
    return Cell("–" if value is None else figure(name, value))


def _speed_chart(evaluated: Evaluated, kind: str, settings: list[str]) -> Chart:
    shown = [charts.label(_called(evaluated, setting)) for setting in settings]
    traces = []
    for number, label in enumerate(evaluated.drawn):
        values = [evaluated.value(label, f"{kind}/{s}" if s else kind) for s in settings]
        points = [(x, y) for x, y in zip(shown, values, strict=True) if y is not None]
        if points:
            traces.append(
                charts.line(label, [x for x, _ in points], [y for _, y in points], number)
            )
    y = charts.axis("tokens/s", rangemode="tozero")
    x = charts.axis("batch × prompt", type="category")
    return Chart(charts.figure(traces, x, y), f"{title(kind)} by batch size and prompt", half=True)
