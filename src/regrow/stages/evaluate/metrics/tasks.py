"""Benchmarks as lm_eval scores them, and the share of the teacher's score that is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from regrow.errors import UserError
from regrow.runtime.progress import say
from regrow.stage_dir import Figure
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult, ratio
from regrow.stages.evaluate.task_rows import Rows, convention

if TYPE_CHECKING:
    from regrow.stages.evaluate.harness import GgufLM, Model

OURS = ("perplexity", "bits_per_byte")
"""Figures of texts, which a task's of that name are told from."""


def measure(subject: EvalModel, context: Context) -> MetricResult:
    """Figures `metric/task` of every task, with standard errors; `metric_kept/task` of students."""
    every = MetricResult()
    if not context.tasks:
        return every
    models = _Models(subject)
    for rows in context.tasks:
        name = f"tasks-{rows.source.name}"
        every.extend(context.kept.get(name, partial(_task, models, rows, context)))
    if context.theirs is not None:
        every.figures.extend(kept_shares(every, context.theirs))
    return every


class _Models:
    """lm_eval's model, made when a task needs it."""

    def __init__(self, subject: EvalModel) -> None:
        self.subject = subject

    @cached_property
    def model(self) -> Model | GgufLM:
        from regrow.stages.evaluate.harness import few_words, model_of

        with few_words(None):
            return model_of(self.subject)


def _task(models: _Models, rows: Rows, context: Context) -> MetricResult:
    from regrow.stages.evaluate.harness import run

    limit, subject = context.config.limit, models.subject
    say(f"evaluate {subject.label}: {rows.source.name}, {convention(rows, limit)}")
    found = run(models.model, rows, limit)
    measured = MetricResult()
    for task, metric, filtering, value in _values(found):
        name = figure_name(task, metric, filtering)
        scores = _items(found, task, metric, filtering)
        if not math.isfinite(value):
            raise UserError(
                f"{subject.label} gives {name} {value}: its checkpoint "
                f"({subject.source}) is broken, or overflows in {subject.arithmetic}"
            )
        figure = Figure(
            name=name,
            value=value,
            n=found["n-samples"].get(task, {}).get("effective"),
            convention=_how(found, rows, task, metric, filtering, models, context),
        )
        if scores is not None:
            measured.items[name] = scores
            stderr = ratio(scores, [1] * len(scores))[1]
            # Of exp(−mean log-likelihood) by the delta method.
            stderr *= value if metric == "perplexity" else 1.0
            figure = figure.model_copy(update={"stderr": stderr, "n": len(scores)})
        measured.figures.append(figure)
    return measured


def _values(found: dict[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """(task or group, metric, filter, value) of all that lm_eval scored."""
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, comma, filtering = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                yield task, metric, filtering, float(value)


def figure_name(task: str, metric: str, filtering: str) -> str:
    """`acc/arc_easy`, `exact_match,strict-match/gsm8k`, `task_perplexity/lambada_openai`."""
    metric = f"task_{metric}" if metric in OURS else metric
    return f"{metric}/{task}" if filtering == "none" else f"{metric},{filtering}/{task}"


def _items(found: dict[str, Any], task: str, metric: str, filtering: str) -> list[float] | None:
    """Scores of the items; None where lm_eval has no number for each."""
    samples = sorted(
        (s for s in found["samples"].get(task, ()) if s["filter"] == filtering),
        key=lambda sample: sample["doc_id"],
    )
    scores = [sample.get(metric) for sample in samples]
    if not scores or not all(isinstance(score, (int, float)) for score in scores):
        return None
    return [float(score) for score in scores]


def _how(
    found: dict[str, Any],
    rows: Rows,
    task: str,
    metric: str,
    filtering: str,
    models: _Models,
    context: Context,
) -> str:
    by = {
        "acc_norm": "log-likelihood of an answer ÷ its characters",
        "perplexity": "exp of the mean negative log-likelihood of the continuation",
    }.get(metric, "" if filtering == "none" else f"answers by {filtering}")
    shots = f"{found['n-shot'].get(task, 0)} worked examples"
    if rows.source.task is not None and rows.source.task.config.get("num_fewshot"):
        shots += " of the training split" if rows.shots else " of the other rows"
    where = f"{convention(rows, context.config.limit)}, {shots}"
    how = f"lm_eval {version('lm_eval')}, no chat template, {models.subject.arithmetic}"
    return ", ".join(part for part in (where, by, how, models.model.remark) if part)


def kept_shares(mine: MetricResult, theirs: MetricResult) -> list[Figure]:
    """Score ÷ the teacher's on the same items, with the standard error of a ratio of paired scores.

    se² = n/(n−1) · Σ (a_i − r b_i)² ÷ (Σ b_i)² (Cochran, 1977, §6.4).
    """
    found = []
    for name, scores in mine.items.items():
        metric, _, task = name.partition("/")
        others = theirs.items.get(name)
        if others is None or len(others) != len(scores) or metric.startswith("task_"):
            continue
        if not sum(others):
            continue  # nothing to keep
        share, stderr = ratio(scores, others)
        how = f"Σ scores ÷ Σ scores of the teacher on the same {len(scores):,} items"
        figure = Figure(
            name=f"{metric}_kept/{task}", value=share, n=len(scores), stderr=stderr, convention=how
        )
        found.append(figure)
    return found
