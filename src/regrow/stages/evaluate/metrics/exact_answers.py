"""Share of rows to which the greedy answer is exactly the right one, and of the teacher's share."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from regrow.runtime.progress import progress
from regrow.stage_dir import Figure
from regrow.stages.evaluate.answer_rows import AnswerRow, read_answers
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult, ratio

Z = 1.959963984540054
"""The 97.5th percentile of the normal distribution: the intervals cover 95 %."""
RESAMPLES = 4000
KIND = "exact_answers"


def measure(model: EvalModel, context: Context) -> MetricResult:
    """Figures `exact_answers/NAME` and, for students, `exact_answers_kept/NAME`."""
    result = MetricResult()
    for name, source in context.config.answers.items():
        rows = read_answers(source, context.config.limit)
        scores = right(model, rows, context.config.answer_tokens)
        figure = f"{KIND}/{name}"
        share, stderr = ratio(scores, [1] * len(scores))
        result.items[figure] = scores
        result.figures.append(
            Figure(
                name=figure,
                value=share,
                n=len(scores),
                stderr=stderr,
                interval=wilson(share, len(scores)),
                convention="share of rows whose greedy answer equals the right one, without white "
                f"space around it; {len(rows):,} rows, at most {context.config.answer_tokens} new "
                f"tokens, Wilson interval of 95 %; {model.arithmetic}",
            )
        )
        of_teacher = context.teacher_result and context.teacher_result.items.get(figure)
        if of_teacher and sum(of_teacher):
            result.figures.append(_kept(name, scores, of_teacher))
    return result


def right(model: EvalModel, rows: Sequence[AnswerRow], new_tokens: int) -> list[float]:
    """1 for each row that the model answers exactly, 0 for the others, in the rows' order."""
    prompts = [row.prompt_ids(model.tokenizer) for row in rows]
    with progress(f"evaluate {model.label}: answers", len(rows), "answers") as counter:
        answers = model.continuations(prompts, new_tokens, counter)
    texts = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    return [float(str(text).strip() == row.answer) for text, row in zip(texts, rows, strict=True)]


def wilson(share: float, count: int) -> tuple[float, float]:
    """The score interval of a proportion (Wilson, 1927).

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) ÷ (1 + z²/n)
    """
    centre = share + Z**2 / (2 * count)
    half = Z * (share * (1 - share) / count + Z**2 / (4 * count**2)) ** 0.5
    scale = 1 + Z**2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _kept(name: str, scores: list[float], of_teacher: list[float]) -> Figure:
    share, stderr = ratio(scores, of_teacher)
    return Figure(
        name=f"{KIND}_kept/{name}",
        value=share,
        n=len(scores),
        stderr=stderr,
        interval=bootstrap(scores, of_teacher),
        convention=f"right answers ÷ those of the teacher on the same {len(scores):,} rows, paired "
        f"bootstrap interval of 95 % from {RESAMPLES:,} resamples",
    )


def bootstrap(scores: list[float], of_teacher: list[float]) -> tuple[float, float]:
    """Percentile interval of Σ a ÷ Σ b, where the rows (a, b) are drawn together.

    Source: Efron and Tibshirani, 1993, §13.3. Resamples with Σ b = 0 are left out.
    """
    random, count = Random(0), len(scores)
    shares = []
    for _ in range(RESAMPLES):
        drawn = random.choices(range(count), k=count)
        if total := sum(of_teacher[row] for row in drawn):
            shares.append(sum(scores[row] for row in drawn) / total)
    shares.sort()
    return shares[round(0.025 * (len(shares) - 1))], shares[round(0.975 * (len(shares) - 1))]
