"""Sections on benchmark scores, shares of the teacher's score, and generated answers."""

from __future__ import annotations

from regrow.stages.report import charts
from regrow.stages.report.evaluated import Evaluated, of
from regrow.stages.report.numbers import QUALITY, SPEED, figure, title
from regrow.stages.report.page import Answers, Block, Cell, Chart, Details, Section, Table
from regrow.stages.report.run_folder import Run

KEPT = "_kept"
"""Suffix of the kind of a figure that is a share of the teacher's score."""
CHOSEN = ("acc_norm", "acc", "exact_match")
"""If a task has several scores, the first of these is plotted."""
NOTE = (
    "Scores as lm_eval gives them; error bars and ± are standard errors. The share is of the "
    "teacher's score on the same items."
)
BAR, AROUND = 17, 110
"""Pixels: height of a bar with its gap, and height of everything around the bars."""


def section(runs: list[Run]) -> Section | None:
    """Bar charts of scores and of kept shares, and a table of all scores."""
    evaluated = of(runs)
    names = [] if evaluated is None else _task_scores(evaluated)
    if evaluated is None or not names:
        return None
    blocks: list[Block] = []
    drawn = scored(evaluated)
    if drawn:
        blocks.append(_bars(evaluated, drawn, "score", "Score by task"))
    shares = [kept for name in drawn if (kept := _kept(name)) in evaluated.names]
    if shares:
        blocks.append(
            _bars(evaluated, shares, "share of the teacher's score", "Share kept by task")
        )
    top = [name for name in names if not _part(name, names)]
    blocks.append(_table(evaluated, top))
    if rest := [name for name in names if name not in top]:
        blocks.append(Details(f"parts of tasks ({len(rest)} scores)", _lines(evaluated, rest)))
    warnings = [
        run.at(f"Warning: {sentence}.")
        for run in runs
        for sentence in (run.evaluation or {}).get("warnings", ())
    ]
    note = " ".join([_note(evaluated, names), *warnings])
    return Section("tasks", "Benchmarks", note, blocks)


def scored(evaluated: Evaluated) -> list[str]:
    """The score of each task to plot."""
    by_task: dict[str, list[str]] = {}
    names = _task_scores(evaluated)
    for name in names:
        if not _part(name, names):
            by_task.setdefault(name.partition("/")[2], []).append(name)
    chosen = []
    for task_scores in by_task.values():
        ranked = [n for kind in CHOSEN for n in task_scores if _kind(n).partition(",")[0] == kind]
        chosen += ranked[:1]
    return chosen


def mean_scores(evaluated: Evaluated, names: list[str]) -> dict[str, float]:
    """Mean score of each model that has all scores in `names`."""
    rows = {label: [evaluated.value(label, name) for name in names] for label in evaluated.labels}
    measured = {label: [v for v in row if v is not None] for label, row in rows.items()}
    return {label: sum(row) / len(row) for label, row in measured.items() if len(row) == len(names)}


def _kind(name: str) -> str:
    return name.partition("/")[0]


def _task_scores(evaluated: Evaluated) -> list[str]:
    """All task scores, without the kept shares."""
    other_kinds = {*QUALITY, *SPEED, *evaluated.metrics}
    return [
        n for n in evaluated.names if _kind(n) not in other_kinds and not _kind(n).endswith(KEPT)
    ]


def _kept(name: str) -> str:
    kind, _, task = name.partition("/")
    return f"{kind}{KEPT}/{task}"


def _part(name: str, names: list[str]) -> bool:
    """Whether the task is part of another one, as mmlu_anatomy is part of mmlu."""
    task = name.partition("/")[2]
    return any(task.startswith(f"{other.partition('/')[2]}_") for other in names)


def _note(evaluated: Evaluated, names: list[str]) -> str:
    unlike = [
        f"{title(name)} (different {aspects})"
        for name in names
        if (aspects := evaluated.unlike(name))
    ]
    more = f" Measured differently across runs: {', '.join(unlike)}." if unlike else ""
    return NOTE + more


def _bars(evaluated: Evaluated, names: list[str], quantity: str, caption: str) -> Chart:
    """Horizontal bars, so that names fit on a phone; one colour per model."""
    tasks = [charts.label(name.partition("/")[2]) for name in names]
    traces = []
    for number, label in enumerate(evaluated.drawn):
        values = [evaluated.value(label, name) for name in names]
        if all(value is None for value in values):
            continue
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": charts.label(label),
                "y": tasks,
                "x": values,
                "error_x": {
                    "type": "data",
                    "array": [evaluated.stderr(label, name) for name in names],
                    "thickness": 1.2,
                    "width": 3,
                    "color": charts.INK,
                },
                "marker": {"color": charts.SHADES[number % len(charts.SHADES)]},
                "hovertemplate": "%{fullData.name}, %{y}: %{x:.1%}<extra></extra>",
            }
        )
    share = {"tickformat": ".0%", "rangemode": "tozero"}
    more = {"barmode": "group", "bargap": 0.25, "bargroupgap": 0.08}
    if quantity != "score":
        more |= {"shapes": [_line_at_100_percent()]}
    x, y = charts.axis(quantity, **share), {"autorange": "reversed", "type": "category"}
    height = AROUND + BAR * len(names) * (len(traces) + 1)
    chart = charts.figure(traces, x, y, **more)
    return Chart(chart, f"{caption}; lines at the ends are standard errors", height)


def _line_at_100_percent() -> charts.Trace:
    """A dashed line at 100 %."""
    line = {"color": charts.SOFT, "width": 1.2, "dash": "dash"}
    return {"type": "line", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def _table(evaluated: Evaluated, names: list[str]) -> Table:
    rows = [
        [_name(name), *(_cell(evaluated, label, name) for label in evaluated.labels)]
        for name in names
    ]
    return Table(["task", *evaluated.labels], rows)


def _name(name: str) -> Cell:
    kind, _, task = name.partition("/")
    return Cell(task, kind.replace(",", ", "), number=False) if task else Cell(kind, number=False)


def _cell(evaluated: Evaluated, label: str, name: str) -> Cell:
    row = evaluated.figure(label, name)
    if row is None:
        return Cell("–")
    share = evaluated.figure(label, _kept(name))
    small = [] if share is None else [f"{_with_error(_kept(name), share)} kept"]
    return Cell(_with_error(name, row), " · ".join(small))


def _with_error(name: str, row: dict[str, object]) -> str:
    value, error = row["value"], row.get("stderr")
    assert isinstance(value, float | int)
    if not isinstance(error, float | int):
        return figure(name, value)
    return f"{figure(name, value)} ± {figure(name, error)}"


def _lines(evaluated: Evaluated, names: list[str]) -> str:
    lines = [" · ".join(["score", *evaluated.labels])]
    for name in names:
        cells = [_cell(evaluated, label, name).text for label in evaluated.labels]
        lines.append(" · ".join([title(name), *cells]))
    return "\n".join(lines)


def generations(runs: list[Run]) -> Section | None:
    """A part per prompt with the answers of all models."""
    evaluated = of(runs)
    if evaluated is None:
        return None
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for label in evaluated.labels:
        for row in evaluated.generations[label]:
            by_prompt.setdefault(row["prompt"], []).append((label, row["text"]))
    blocks: list[Block] = [Answers(prompt, answers) for prompt, answers in by_prompt.items()]
    note = "Greedy continuations, cut at a fixed number of tokens."
    return Section("generations", "In their own words", note, blocks) if blocks else None
