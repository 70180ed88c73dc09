"""Benchmark scores by lm_eval, and each score as a share of the teacher's score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from regrow.errors import UserError
from regrow.runtime.progress import say
from regrow.stage_dir import Figure
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult, ratio
from regrow.stages.evaluate.task_rows import Rows, convention

if TYPE_CHECKING:
    from regrow.stages.evaluate.engine_lm import EngineLM
    from regrow.stages.evaluate.harness import Model

RANKS = "split"
OURS = ("perplexity", "bits_per_byte")
"""Names of figures on texts; a task's figure with the same name gets the prefix `task_`."""


def measure(model: EvalModel, context: Context) -> MetricResult:
    """Score every task: figures `metric/task` and, for students, `metric_kept/task`."""
    result = MetricResult()
    if not context.tasks:
        return result
    with ExitStack() as stack:
        harness = _Harness(model, context.config.backend, stack)
        for rows in context.tasks:
            name = f"tasks-{rows.source.name}"
            result.extend(context.cache.get(name, partial(_task, harness, rows, context)))
    if context.teacher_result is not None:
        result.figures.extend(kept_shares(result, context.teacher_result))
    return result


class _Harness:
    """A model, and its lm_eval interface, which is created for the first task.

    It stays open until the stack is closed.
    """

    def __init__(self, model: EvalModel, backend: str, stack: ExitStack) -> None:
        self.model, self.backend, self.stack = model, backend, stack

    @cached_property
    def lm(self) -> Model | EngineLM:
        from regrow.stages.evaluate.harness import opened, quiet_log

        with quiet_log(None):
            return self.stack.enter_context(opened(self.model, self.backend))


def _task(harness: _Harness, rows: Rows, context: Context) -> MetricResult:
    from regrow.stages.evaluate.harness import run

    limit, model = context.config.limit, harness.model
    say(f"evaluate {model.label}: {rows.source.name}, {convention(rows, limit)}")
    scored = run(harness.lm, rows, limit)
    result = MetricResult()
    for task, metric, filtering, value in _values(scored):
        name = figure_name(task, metric, filtering)
        scores = _items(scored, task, metric, filtering)
        if not math.isfinite(value):
            raise UserError(
                f"{model.label} gives {name} {value}: its checkpoint "
                f"({model.source}) is broken, or overflows in {harness.lm.arithmetic}"
            )
        figure = Figure(
            name=name,
            value=value,
            n=scored["n-samples"].get(task, {}).get("effective"),
            convention=_figure_convention(scored, rows, task, metric, filtering, harness, context),
        )
        if scores is not None:
            result.items[name] = scores
            stderr = ratio(scores, [1] * len(scores))[1]
            # Standard error of exp(−mean log-likelihood) by the delta method.
            stderr *= value if metric == "perplexity" else 1.0
            figure = figure.model_copy(update={"stderr": stderr, "n": len(scores)})
        result.figures.append(figure)
    return result


def _values(scored: dict[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Yield (task or group, metric, filter, value) for every score of lm_eval."""
    for task, results in scored["results"].items():
        for key, value in results.items():
            metric, comma, filtering = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                yield task, metric, filtering, float(value)


def figure_name(task: str, metric: str, filtering: str) -> str:
    """A name such as `acc/arc_easy` or `exact_match,strict-match/gsm8k`."""
    metric = f"task_{metric}" if metric in OURS else metric
    return f"{metric}/{task}" if filtering == "none" else f"{metric},{filtering}/{task}"


def _items(scored: dict[str, Any], task: str, metric: str, filtering: str) -> list[float] | None:
    """Scores of the single items; None if lm_eval has no number for each item."""
    samples = sorted(
        (s for s in scored["samples"].get(task, ()) if s["filter"] == filtering),
        key=lambda sample: sample["doc_id"],
    )
    scores = [sample.get(metric) for sample in samples]
    if not scores or not all(isinstance(score, (int, float)) for score in scores):
        return None
    return [float(score) for score in scores]


def _figure_convention(
    scored: dict[str, Any],
    rows: Rows,
    task: str,
    metric: str,
    filtering: str,
    harness: _Harness,
    context: Context,
) -> str:
    scoring = {
        "acc_norm": "log-likelihood of an answer ÷ its characters",
        "perplexity": "exp of the mean negative log-likelihood of the continuation",
    }.get(metric, "" if filtering == "none" else f"answers by {filtering}")
    shots = f"{scored['n-shot'].get(task, 0)} worked examples"
    if rows.source.task is not None and rows.source.task.config.get("num_fewshot"):
        shots += " of the training split" if rows.shots else " of the other rows"
    row_text = f"{convention(rows, context.config.limit)}, {shots}"
    engine = f"lm_eval {version('lm_eval')}, no chat template, {harness.lm.arithmetic}"
    return ", ".join(part for part in (row_text, scoring, engine, harness.lm.remark) if part)


def kept_shares(result: MetricResult, of_teacher: MetricResult) -> list[Figure]:
    """Score ÷ the teacher's score on the same items; standard error of a paired ratio.

    se² = n/(n−1) · Σ (a_i − r b_i)² ÷ (Σ b_i)² (Cochran, 1977, §6.4).
    """
    figures = []
    for name, scores in result.items.items():
        metric, _, task = name.partition("/")
        others = of_teacher.items.get(name)
        if others is None or len(others) != len(scores) or metric.startswith("task_"):
            continue
        if not sum(others):
            continue  # the teacher scores 0
        share, stderr = ratio(scores, others)
        figures.append(
            Figure(
                name=f"{metric}_kept/{task}",
                value=share,
                n=len(scores),
                stderr=stderr,
                convention=f"Σ scores ÷ Σ scores of the teacher on the same {len(scores):,} items",
            )
        )
    return figures
